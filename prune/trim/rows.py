"""Questions as token rows: what is tuned on, scanned and tested, and that they do not mix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.errors import ShortstackError
from shortstack.questions import Question, refuse_leaks
from shortstack.tokens import Encoder

LEAST_TUNE, LEAST_SCAN = 8, 4
"""Fewer rows than these decide nothing."""
SCAN_SHARE, SCAN_MOST = 0.2, 200


@dataclass(frozen=True)
class Parts:
    """Disjoint questions: the loop sees `tune` and `scan`, never `test`."""

    tune: tuple[Question, ...]
    scan: tuple[Question, ...]
    test: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        refuse_leaks({"tune": self.tune, "scan": self.scan, "test": self.test})
        for name, least in (("tune", LEAST_TUNE), ("scan", LEAST_SCAN)):
            rows = getattr(self, name)
            if len({question.key for question in rows}) < least:
                raise ShortstackError(
                    f"there are {len(rows)} {name} rows; {least} different ones are needed. "
                    "Give more questions."
                )


def split_scan(
    tune: Sequence[Question], seed: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Take a fifth of the rows, at most 200, away for scanning. Equal questions stay together."""
    keys = sorted({question.key for question in tune})
    random.Random(seed).shuffle(keys)
    taken = set(keys[: min(SCAN_MOST, int(SCAN_SHARE * len(keys)))])
    return (
        tuple(question for question in tune if question.key not in taken),
        tuple(question for question in tune if question.key in taken),
    )


@dataclass(frozen=True)
class Row:
    """A prompt with one continuation, as ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: nothing is predicted from the last id."""
        return (self.prompt + self.answer)[:-1]


def encode(encoder: Encoder, question: Question, max_prompt_tokens: int) -> tuple[Row, ...]:
    """One row a choice. The continuation's ids are those that the whole text has beyond the
    prompt's; of a prompt that is too long the front goes, where the context is."""
    rows = []
    for prompt, continuation in question.rendered():
        before = encoder.encode(prompt)
        whole = encoder.encode(prompt + continuation)
        answer = whole[len(before) :] or whole[-1:]
        room = max(1, max_prompt_tokens - len(encoder.prefix))
        rows.append(Row((*encoder.prefix, *before[-room:]), tuple(answer)))
    return tuple(rows)


@dataclass(frozen=True)
class Example:
    """What one question teaches: rows, and which of them is right; one row, or one a choice."""

    rows: tuple[Row, ...]
    answer: int = 0


def example(
    encoder: Encoder, question: Question, max_prompt_tokens: int, objective: str
) -> Example:
    """All choices for the objective `choices`, the right one alone for `answer`."""
    rows = encode(encoder, question, max_prompt_tokens)
    if objective == "choices":
        return Example(rows, question.answer)
    return Example((rows[question.answer],))
