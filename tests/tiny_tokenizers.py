"""Tokenizers whose ids are known by hand: a byte's id is its value, merges and special tokens come after 255."""

import dataclasses

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Two merges, "23" (256) and " 3" (257): prompt and response can grow together on them.
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA = ("{{ bos_token }}{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>\n\n{{ m['content'] | trim }}<|eot|>"
         "{% endfor %}"
         "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}")


def _byte_names() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def make(specials: list[str], bos_first: bool = False, template: str | None = None, **named) -> PreTrainedTokenizerFast:
    names = _byte_names()
    vocabulary = {name: byte for byte, name in names.items()}
    merges = [("2", "3"), (names[32], "3")]
    vocabulary |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    if bos_first:
        core.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], core.token_to_id(specials[0]))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    """No BOS at all; <|endoftext|> 258, <|im_start|> 259, <|im_end|> 260."""
    return make(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template=CHATML, eos_token="<|im_end|>",
                pad_token="<|endoftext|>")


def pad_is_eos() -> PreTrainedTokenizerFast:
    return make(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template=CHATML, eos_token="<|im_end|>",
                pad_token="<|im_end|>")


def base_chatml() -> PreTrainedTokenizerFast:
    """A base model: its template closes turns with <|im_end|> 260, but its eos is <|endoftext|> 258."""
    return make(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template=CHATML, eos_token="<|endoftext|>",
                pad_token="<|endoftext|>")


def llama() -> PreTrainedTokenizerFast:
    """BOS 258 from the post-processor and from the template; </s> 259, <|h|> 260, <|/h|> 261, <|eot|> 262."""
    return make(["<s>", "</s>", "<|h|>", "<|/h|>", "<|eot|>"], bos_first=True, template=LLAMA, bos_token="<s>",
                eos_token="</s>", pad_token="</s>")


def plain() -> PreTrainedTokenizerFast:
    """No chat template; <|endoftext|> 258 is eos and pad, as in GPT-2."""
    return make(["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def spaced(way: str) -> PreTrainedTokenizerFast:
    """A space before every text, as SentencePiece puts it: "prepend" by a normalizer (Llama 2), "first" or "always" by
    the Metaspace pre-tokenizer; or "bytes", before words of bytes. A character a token, but for the word Yes."""
    space, characters = ("Ġ" if way == "bytes" else "▁"), [chr(i) for i in range(33, 127)]
    merges = [("Y", "e"), ("Ye", "s"), (space, "Yes")]
    vocabulary = ["<unk>", "\n", "Ċ", space, *characters, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    if way == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    elif way == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=way, split=False)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("</s>", "<a>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


@dataclasses.dataclass
class DataArguments:
    """The part of TrainArguments that reading data needs, with its defaults."""

    loss: str = "dpo"
    prompt_field: str = None
    chosen_field: str = None
    rejected_field: str = None
    boundary: str = "error"
    train_on: str = "all"
    max_length: int = 1  # given; what it is comes as the limit
    max_prompt_length: int = None
    overlong: str = "error"
    on_bad_row: str = "error"
