"""Short answers and last words by greedy generation, right where they match.

A last word is LAMBADA's task (Paperno et al. 2016, arXiv:1606.06031): a passage without its last
word, which a reader of the whole passage guesses and a reader of the last sentence does not.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.evaluate import metrics
from shortstack.evaluate.codec import Codec, with_prefix
from shortstack.evaluate.scorer import Scorer
from shortstack.evaluate.sets import Row, SetSpec
from shortstack.evaluate.subsets import subset
from shortstack.progress import OnProgress
from shortstack.rows import is_jsonl, read_rows

METRICS = ("exact_match", "last_number")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STOPS = ("\n\n", "\nQuestion:")
"""A small model goes on with a question of its own: the answer ends before it."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue and the answer that is wanted."""

    id: str
    prompt: str
    answer: str
    word: bool
    """The answer is the next word (LAMBADA), not a line."""


def open_prompts(path: Path) -> tuple[Prompt, ...]:
    """Rows `{context, target}` or `{text, target}` (the text ends in the target: its last word),
    or `{question, answer_text}` with an optional `context`.

    Raises ShortstackError, naming file and line, for other columns, and for an empty file.
    """
    if not is_jsonl(path):
        raise ShortstackError(f"{path} is not .jsonl. Give one JSON object a line.")
    found = tuple(_prompt(path, number, row) for number, row in read_rows(path))
    if not found:
        raise ShortstackError(f"{path} holds no rows. Give one JSON object a line.")
    return found


def _prompt(path: Path, number: int, row: Mapping[str, Any]) -> Prompt:
    def text(key: str) -> str:
        value = row.get(key)
        return value.strip() if isinstance(value, str) else ""

    name = str(row.get("id", number))
    if text("question") and text("answer_text"):
        head = f"{text('context')}\n" if text("context") else ""
        prompt = f"{head}Question: {text('question')}\nAnswer:"
        return Prompt(name, prompt, text("answer_text"), word=False)
    target, whole = text("target"), text("context") or text("text")
    if target and whole:
        if not text("context"):
            if not whole.endswith(target) or whole == target:
                raise ShortstackError(
                    f"{path}, line {number}: 'text' does not end in 'target' after other words. "
                    "Mend the row."
                )
            whole = whole.removesuffix(target).rstrip()
        return Prompt(name, whole, target, word=True)
    raise ShortstackError(
        f"{path}, line {number}: neither 'question' and 'answer_text' nor 'text' and 'target'. "
        "Rename the columns."
    )


def check(path: Path, metric: str) -> None:
    """Raises ShortstackError for a file whose rows are of another kind, or hold an answer that
    would not count as right if it were said: two words for one, no number, only punctuation."""
    for prompt in open_prompts(path):
        if not is_right(prompt.answer, prompt, metric):
            raise ShortstackError(
                f"{path}, row {prompt.id}: the answer {prompt.answer!r} would not be right by "
                f"{metric} itself. Mend the row or ask for another metric."
            )


def score(
    scorer: Scorer, codec: Codec, spec: SetSpec, seed: int, progress: OnProgress
) -> list[Row]:
    """Generate an answer for each row; `right` by the set's metric."""
    prompts = subset(open_prompts(spec.path), spec.limit, seed)
    ended = _ended(prompts, spec.metric)

    def stop(ids: list[int]) -> bool:
        return ids[-1] == codec.end or ended(codec.decode(ids))

    encoded = [with_prefix(codec, prompt.prompt) for prompt in prompts]
    answers = scorer.generate(encoded, spec.max_tokens, stop, progress)
    rows = []
    for prompt, ids in zip(prompts, answers, strict=True):
        said = codec.decode([token for token in ids if token != codec.end])
        right = is_right(said, prompt, spec.metric)
        if prompt.word and spec.metric == "exact_match":
            said = _first_word(said)  # how far beyond it a runtime went is not its answer
        rows.append({"id": prompt.id, "answer": prompt.answer, "said": said, "right": right})
    return rows


def _ended(prompts: Sequence[Prompt], metric: str) -> Callable[[str], bool]:
    """Whether an answer holds all that will be looked at."""
    if metric == "last_number":  # a chain of thought has lines
        return lambda said: any(mark in said for mark in STOPS)
    if all(prompt.word for prompt in prompts):
        return lambda said: re.search(r"\S\s", said) is not None
    return lambda said: "\n" in said.lstrip() or any(mark in said for mark in STOPS)


def is_right(said: str, prompt: Prompt, metric: str) -> bool:
    """`exact_match`: the first line is the answer, but for case, punctuation and articles; where
    a word is wanted, the first word is, but for case and punctuation. `last_number`: the last
    number said is the answer's."""
    if metric == "last_number":
        return _last_number(_cut(said)) == _last_number(prompt.answer) is not None
    if prompt.word:
        return _bare(_first_word(said)) == _bare(prompt.answer) != ""
    return plain(said.strip().split("\n")[0]) == plain(prompt.answer)


def plain(text: str) -> str:
    """Lower case, without articles and punctuation, single spaces (SQuAD's rule, whose
    punctuation is ASCII's)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", _bare(text)).split())


def _bare(text: str) -> str:
    """Lower case, without punctuation: the quotation marks and dashes of books, too."""
    return "".join(
        char
        for char in text.lower()
        if char not in string.punctuation and not unicodedata.category(char).startswith("P")
    )


def _first_word(said: str) -> str:
    return (said.split() or [""])[0]


def _cut(said: str) -> str:
    ends = [at for mark in STOPS if (at := said.find(mark)) >= 0]
    return said[: min(ends)] if ends else said


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The share of right rows with Wilson's interval. Chance is 0: any text may be generated."""
    share = metrics.wilson(sum(row["right"] for row in rows), len(rows))
    return {"n": len(rows), "chance": 0.0, **{name: share.to_dict() for name in METRICS}}


def compare(original: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    first, second = ([row["right"] for row in side] for side in (original, rows))
    same = sum(a["said"] == b["said"] for a, b in zip(original, rows, strict=True))
    return {
        "difference": metrics.paired_difference(first, second).to_dict(),
        "same_text": same / len(rows),
    }
