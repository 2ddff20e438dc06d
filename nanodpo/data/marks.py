"""Tokens of a tokenizer that stand in texts, such as marks of turns."""

import os.path
import re


def added_tokens(tokenizer) -> list[str]:
    """Tokens that are read as such wherever they stand, the longest first; some tokenizers have white space there."""
    return sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)


def shared_start(tokenizer, a: str, b: str, at_end: bool = False) -> str:
    """The text with which both begin, or end, and in which no token is cut: a token counts as one character, and so
    does a tag such as <think>, which is no token of some tokenizers."""
    pattern, codes = re.compile("|".join([*map(re.escape, added_tokens(tokenizer)), r"</?\w+>"])), {}
    a, b = (pattern.sub(lambda found: codes.setdefault(found[0], chr(0xF0000 + len(codes))), text)
            [:: -1 if at_end else 1] for text in (a, b))
    pieces = {code: piece for piece, code in codes.items()}
    return "".join(pieces.get(c, c) for c in os.path.commonprefix([a, b])[:: -1 if at_end else 1])


def token_text(tokenizer, i: int) -> str:
    r"""The text of one token. Bytes of it that are no whole character stand as \xf0."""
    text, token = tokenizer.decode([i]), tokenizer.convert_ids_to_tokens(i)
    if "\ufffd" not in text or token is None:
        return text
    if token in tokenizer.get_added_vocab():
        return token
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's
        return rf"\x{byte[1].lower()}"
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import

    known = {letter: byte for byte, letter in bytes_to_unicode().items()}  # byte-level BPE writes a byte as a letter
    if not {*token} <= known.keys():
        return text
    return bytes(known[letter] for letter in token).decode(errors="backslashreplace")


def spaced_text(tokenizer, i: int) -> str:
    """The text of one token as it stands within a text: with its first space, which the tokenizers of Llama 2 and
    Mistral drop where they decode it alone, as if every token were the first."""
    text, token = token_text(tokenizer, i), tokenizer.convert_ids_to_tokens(i)
    return f" {text}" if token and token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") == f" {text}" else text
