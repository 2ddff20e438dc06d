"""What answer a text gives: each by the eye of a reader."""

import pytest

from nanodpo.scoring.answers import final_answer

ENDS = {
    "half of it is .5": "0.5", "it is No.5": "5", "let me see...5": "5", "about 1.5e-3": "1.5e-3", "6E5": "6e5",
    "about 6e\u22125.": "6e-5", "GPT-4": "4", "f(2)-7": "7", "(-7)": "-7", "3 / 4": "3/4", "12,34": "34",
    "2 + 5 = 7<|im_end|>": "7", "7 </s> <pad>": "7", "1,234,567": "1234567", "it is $7$.": "7", "**7**": "7",
    '{"answer": 7}': "7", "1\u00a0000": None, "1\u202f000": None, "1\u2009000": None, "on 1/2/2024": None,
    "on 3.10.2024": None, "2^10": None, "2^{10}": None, "2^{1,234}": None, "2^(10)": None, "2^-10": None,
    "7 " + "<>" * 40 + "x": None}  # in no time, though a tag could be read in two ways
NAMED = {
    "The answer is 12 apples": "12", "The answers are 12 apples": "12", "ANSWER: 12 apples": "12",
    "The answer is 3 apples. No, the answer is 4 apples": "4", "The answer is 3 / 4 of it": "3/4",
    "The answer is 5th in line": None, "There is no answer. 5 apples are left": None, "An answer <5 is one": None,
    "The answer is 1\u00a0000 apples": None, "The answer is 1\u202f000 apples": None,
    "The answer is 1\u2009000 apples": None, "The answer is 2^10 apples": None, "The answer is 2^{10} apples": None,
    "The answer is 2^(10) apples": None, "The answer is 1/2/2024 then": None, "The answer is 1.2.3 then": None}
LATEX = {
    r"it is \(7\)": "7", r"\boxed{}": None, r"\boxed{\{1,2\}}": r"\{1,2\}", r"\boxed{1+\boxed{2}}": "2",
    r"\boxed{\left\{1\right.}": r"\left\{1\right.",
    r"\boxed{4}, no, \boxed{5}": "5", r"\boxed{ 5,000.0 }": "5000",
    # A number within the braces of a command is a part of something else, and what is cut off may go on.
    r"it is $\frac{1}{2}$.": None, r"it is \(3\sqrt{2}\)": None, r"so \sqrt{9} = 3": "3",
    r"it is $\mathbf{7}$.": "7", r"\textbf{x + y = 7}": "7", r"\mathbf{x_{7}}": None, "${7}$": "7",
    r"\sqrt[3]{8}": None,
    r"it is $\frac12$.": None, r"it is $\sqrt2$.": None, r"$x\approx 7$": "7", r"$x\approx7$": "7",
    r"so x_{2}": None, r"so \boxed{5": None, r"\left\{ x + y = 7, so the answer is 5": "5"}
THINKING = {"</think> answer 3 <|im_start|>answer four": None, "<|im_start|>answer 3</think> 4": "4",
            "3</think> four": None}


@pytest.mark.parametrize("text, answer", [*(ENDS | NAMED | LATEX | THINKING).items()])
def test_the_answer_of_a_text(text, answer):
    """The number at its end, also in digits by groups of three, and no part of a power, a date, a time or another
    number; else the one that it names as its answer; and what is in its last box, whatever follows."""
    assert final_answer(text) == answer
