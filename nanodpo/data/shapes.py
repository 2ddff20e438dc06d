"""Rows as people have them -> prompt, chosen and rejected, each as text or as messages with role and content.

Which column means what is decided once for a file, by names (`choose_columns`). Then each row is brought into one form
(`read_row`): ShareGPT's from and value, Alpaca's instruction and input, OpenAI's preference pairs, lists of questions
with answers, contents in parts. What is no message stays as it is, and is refused where its text is needed.
"""

import dataclasses
import itertools

from ..errors import UserError
from .answers import WEIGHT, answers_of
from .messages import first_role, in_messages, read_json, turn, turns_of

ALPACA = ("instruction", "query")  # what the user says, with `input`, after `history`
TURNS = ("conversations", "conversation")  # a whole conversation, or beside chosen and rejected its beginning
PROMPT_FIELDS, CHOSEN_FIELDS, REJECTED_FIELDS = (
    ("prompt", "question", *ALPACA, *TURNS),
    ("chosen", "completion", "output", "text", "messages", "response", "response_j", "chosen_messages", *TURNS,
     "preferred_output"),
    ("rejected", "worse-text", "response_k", "rejected_messages", "non_preferred_output"))
SYSTEM = ("system", "system_prompt")
OF_PROMPTS = (*SYSTEM, "input", "instruction", "history", "context")  # part of what is asked, by name
FOR_TEMPLATES = ("tools", "chat_template_kwargs")  # what a chat template is given beside the messages
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # a language model of text can't be asked about these
# Columns of several answers a row, and of what they are worth; and of two answers, like response_0 and response_1
SEVERAL, SCORES = ("completions", "answers", "responses", "summaries"), ("scores", "ranks", "rank", "ratings", "choice")
ANSWERS, NUMBERED = ("answer", "response", "completion", "output", "ref", "conversation"), ("AB", "ab", "01", "12")
RESERVED = {"chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "padding",
            "return_tensors", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs",
            "conversation"}  # arguments of apply_chat_template that a template does not see


@dataclasses.dataclass
class Columns:
    """The names of the columns; None where there is none."""

    prompt: str | None
    chosen: str
    rejected: str | None
    asks: bool = False  # is the prompt what a user says, a part of a conversation, though it is text?
    whole: bool = False  # is a row one text without a prompt, for language modelling?
    alike: bool = False  # do chosen and rejected, as text, begin with their prompt?
    beside: tuple[str, ...] = ()  # columns of a conversation's prompt, those for a chat template, and the weight

    @property
    def fields(self) -> tuple[str | None, str, str | None]:
        return self.prompt, self.chosen, self.rejected


@dataclasses.dataclass
class Row:
    """One row: each side is text, a list of messages, or whatever else the file has in its place."""

    prompt: object
    chosen: object
    rejected: object
    options: dict = dataclasses.field(default_factory=dict)  # for apply_chat_template


def choose_columns(path: str, rows: list[dict], args, pairs: bool) -> Columns:
    """Which columns of a file mean what; prompt and, unless `pairs`, rejected may be missing. Raises UserError."""
    names = list(rows[0])

    def choose(flag, candidates, needed):
        named = getattr(args, flag)
        if named and named not in names:
            raise UserError(f"{path}: has no column {named!r} (--{flag}); it has {', '.join(names)}")
        found = named or next((name for name in candidates if name in names), None)
        if needed and not found:
            _check_judged(path, names)
            raise UserError(f"{path}: has no column {' or '.join(candidates)}; it has {', '.join(names)}: "
                            f"name one with --{flag}"
                            + ", or train on chosen alone with --loss sft" * (flag == "rejected_field"))
        return found

    if not args.chosen_field and "chosen" not in names:
        _check_scored(path, rows[0])
        _check_labelled(path, rows)
    transcripts = not args.chosen_field and not args.rejected_field and {"text", "worse-text"} <= {*names}
    chosen = choose("chosen_field", ("text",) if transcripts else CHOSEN_FIELDS, True)
    openai = ("input",) * (chosen == "preferred_output")
    prompt = choose("prompt_field", [*openai, *(name for name in PROMPT_FIELDS if name != chosen)], False)
    rejected = choose("rejected_field", REJECTED_FIELDS, pairs)
    asks = not args.prompt_field and prompt in (*ALPACA, *TURNS)
    whole = args.loss == "sft" and not prompt and not rejected and chosen in ("text", args.chosen_field)
    _check_apart(path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    columns = Columns(prompt, chosen, rejected, asks, whole)
    for i, row in enumerate(rows):
        _check_unread(f"{path}: row {i}", row, columns)
    columns.beside = _beside(rows, columns)
    # A column that may well be the prompt is better named than left out.
    columns.alike = bool(rejected and not prompt and not unread_parts(rows, columns))
    return columns


def _check_apart(path: str, columns: dict[str, str | None]) -> None:
    """Raises UserError for a column that is to be two things."""
    for (one, name), (other, same) in itertools.combinations(columns.items(), 2):
        if name is not None and name == same:
            raise UserError(f"{path}: column {name} would be both {one} and {other}; name another with --{one}_field "
                            f"or --{other}_field")


def _check_scored(path: str, row: dict) -> None:
    """Raises UserError for several answers a row with scores or ranks, as UltraFeedback had them before pairs were
    made."""
    lists = [name for name in SEVERAL if isinstance(row.get(name), list) and row[name]]
    judged = not {*SCORES}.isdisjoint(row)
    if name := next((name for name in lists if judged or isinstance(row[name][0], dict)), None):
        raise UserError(f"{path}: has {name}, several answers a row with their scores, and which two make a pair "
                        "is for you to say; write them into columns prompt, chosen and rejected (UltraFeedback's are "
                        "on the hub: HuggingFaceH4/ultrafeedback_binarized::train_prefs)")


def _check_labelled(path: str, rows: list[dict]) -> None:
    """Raises UserError for unpaired answers of which a label says whether they are good (KTO): trained on as they
    stand, the bad ones would count as chosen. A CSV file has its labels as text. Some write 0 and 1, and numbers that
    are others, too, are something else."""
    labels = [str(row.get("label")).strip().lower() for row in rows] if "completion" in rows[0] else []
    truths = {"true", "false", "1", "0", "1.0", "0.0", "none", ""}  # those of a column with gaps, too
    false = ("false", "0", "0.0") if {*labels} <= truths else ("false",)
    if bad := sum(label in false for label in labels):
        raise UserError(f"{path}: has unpaired answers (KTO), {bad} of {len(rows)} with label false or 0; join a true "
                        "and a false one of the same prompt into columns prompt, chosen and rejected, or for --loss "
                        "sft leave out the rows with label false; if label means something else, give that column "
                        "another name")


def _check_judged(path: str, names: list[str]) -> None:
    """Raises UserError for two answers a row of which another column says the better one: neither of the two is
    chosen in every row."""
    for first, second in itertools.combinations(names, 2):
        base = first[:-1]
        if base == second[:-1] and first[-1] + second[-1] in NUMBERED and base.rstrip("_").endswith(ANSWERS):
            raise UserError(f"{path}: has {first} and {second}, two answers a row, and the better one is not the same "
                            "in every row; write the better into a column chosen and the other into rejected")


def _check_unread(where: str, row: dict, columns: Columns) -> None:
    """Raises UserError for a row with columns without which its prompt would be another one."""
    if name := next((name for name in MEDIA if row.get(name)), None):
        raise UserError(f"{where}: has {name}, which a model of text can't see; remove that column if the text does "
                        "not need it")
    if row.get("documents") and _rendered(row, columns):
        raise UserError(f"{where}: has documents for the chat template, which is not supported; remove that column, or "
                        "give whole rendered transcripts")


def _rendered(row: dict, columns: Columns) -> bool:
    """Does the chat template write this row, or a part of it? Plain text brings all that it says."""
    return columns.asks or any(isinstance(answer, (list, dict)) for name in columns.fields if name
                               for answer in answers_of(row[name]))


def _beside(rows: list[dict], columns: Columns) -> tuple[str, ...]:
    alpaca = columns.asks and columns.prompt in ALPACA
    names = (*SYSTEM, *("input", "history") * alpaca, *FOR_TEMPLATES)
    found = [name for name in names if any(row.get(name) and _rendered(row, columns) for row in rows)]
    found += [WEIGHT] * any(row.get(WEIGHT) is not None for row in rows)
    return tuple(name for name in found if name not in columns.fields)


def describe_columns(rows: list[dict], columns: Columns, more: tuple[str, ...] = ()) -> str:
    """One line on which columns are read, as what, and which are not."""
    parts = [name if name == part else f"{part} = {name}"
             for part, name in zip(("prompt", "chosen", "rejected"), columns.fields) if name]
    read = (*columns.fields, *columns.beside, *more)
    unread = [name for name in rows[0] if name not in read]
    return (f"columns: {', '.join([*parts, *more])}" + f"; with {', '.join(columns.beside)}" * bool(columns.beside)
            + f"; not read: {', '.join(unread)}" * bool(unread))


def unread_parts(rows: list[dict], columns: Columns) -> dict[str, int]:
    """{column: rows that have something in it} of columns that are not read, and whose name says that they are part of
    what is asked."""
    read = (*columns.fields, *columns.beside)
    found = {name: sum(bool(row.get(name)) for row in rows) for name in OF_PROMPTS if name not in read}
    return {name: count for name, count in found.items() if count}


# Rows


def read_row(row: dict, columns: Columns) -> Row:
    """One row in the form that texts.py takes. Raises UserError for what it can't mean."""
    prompt, chosen, rejected = (row[name] if name else None for name in columns.fields)
    options = {name: read_json(name, row[name]) for name in FOR_TEMPLATES if row.get(name)}
    if isinstance(prompt, dict) and isinstance(prompt.get("messages"), list):  # OpenAI's input
        options |= {"tools": prompt["tools"]} if prompt.get("tools") else {}
        prompt = prompt["messages"]
    if columns.asks and columns.prompt in ALPACA:
        prompt = _alpaca(row, prompt)
    prompt, chosen, rejected = (in_messages(side, value) for side, value in (
        ("prompt", prompt), ("chosen", chosen), ("rejected", rejected)))
    if columns.asks and isinstance(prompt, list) and first_role(chosen) in ("system", "user") and (
            chosen[0] not in prompt):
        prompt = None  # the sides are whole conversations, and the column may be anything
    if columns.asks and isinstance(prompt, list) and prompt:
        chosen, rejected = ([turn("assistant", side)] if isinstance(side, str) and side else side
                            for side in (chosen, rejected))
    system = next((row[name] for name in SYSTEM if name in columns.beside and row.get(name)), None)
    if system:
        prompt, chosen, rejected = _with_system(turn("system", system), prompt, chosen, rejected)
    if not isinstance(options.get("tools", []), list):
        raise UserError(f"has tools of type {type(options['tools']).__name__}; they must be a list")
    kwargs = options.pop("chat_template_kwargs", {})
    check_options("chat_template_kwargs", kwargs)
    return Row(prompt, chosen, rejected, options | kwargs)


def check_options(name: str, options) -> None:
    """Raises UserError for what apply_chat_template can't be given."""
    if not isinstance(options, dict):
        raise UserError(f"has {name} of type {type(options).__name__}; they must be an object, like "
                        '{"enable_thinking": false}')
    if odd := sorted(RESERVED & {*options}):
        raise UserError(f"has {odd[0]} in {name}, which is not the template's to decide")


def options_of(text: str | None) -> dict:
    """The value of --chat_template_kwargs. Raises UserError for what is no JSON object."""
    try:
        options = read_json("options", text or {})
        check_options("options", options)
    except UserError as error:
        raise UserError(f"--chat_template_kwargs {text}: {error}") from error
    return options


def _alpaca(row: dict, instruction):
    """The user's turn: the instruction and, on the next line, its input; after earlier questions and answers."""
    parts = [part for part in (instruction, row.get("input")) if part is not None]
    if odd := [part for part in parts if not isinstance(part, str)]:
        return odd[0]
    if not (question := "\n".join(filter(None, parts))):
        return ""
    return [*turns_of(row.get("history") or []), turn("user", question)]


def _with_system(system: dict, prompt, chosen, rejected):
    """A conversation that begins with this system message, unless it has one."""
    def begun(side):
        return [system, *side] if first_role(side) not in (None, "system") else side

    if isinstance(prompt, list) and prompt:
        return begun(prompt), chosen, rejected
    return prompt, begun(chosen), begun(rejected)
