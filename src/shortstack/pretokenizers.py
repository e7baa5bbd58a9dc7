"""How byte-level tokenizers cut text before they merge: the rules that GGUF knows by name.

Intake reads them (name to tokenizer.json), export writes them (tokenizer.json to name).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`: what llama.cpp does with a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"

LLAMA3_SPLIT = rf"{_LETTERS}\p{{N}}{{1,3}}{_REST}"
QWEN2_SPLIT = rf"{_LETTERS}\p{{N}}{_REST}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One named rule.

    `split` is a regular expression; None means GPT-2's own, built into the byte-level step.
    `whole_words_first`: a whole word is looked up before it is merged (`ignore_merges`).
    """

    split: str | None = None
    single_digits: bool = False
    whole_words_first: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer(split=LLAMA3_SPLIT, whole_words_first=True, add_bos=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": PreTokenizer(split=TEKKEN_SPLIT, whole_words_first=True, add_bos=True),
}
"""`tokenizer.ggml.pre` -> rule; where several names mean one rule, the first is what we write."""
