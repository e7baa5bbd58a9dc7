"""Multiple choice by log-likelihood: the answer is the likeliest continuation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shortstack.errors import ShortstackError
from shortstack.evaluate import metrics
from shortstack.evaluate.codec import Codec, encode_pair
from shortstack.evaluate.scorer import Scorer
from shortstack.progress import OnProgress, silent
from shortstack.questions import Question

T = TypeVar("T")


@dataclass(frozen=True)
class ChoiceRow:
    """One question under a model: nats and tokens of each choice, its length in characters."""

    id: str
    answer: int
    nats: tuple[float, ...]
    n_tokens: tuple[int, ...]
    n_chars: tuple[int, ...]

    @property
    def chosen(self) -> int:
        return metrics.chosen(self.nats)

    @property
    def chosen_by_length(self) -> int:
        return metrics.chosen_by_length(self.nats, self.n_chars)

    @property
    def right(self) -> bool:
        return self.chosen == self.answer

    @property
    def right_by_length(self) -> bool:
        return self.chosen_by_length == self.answer

    @property
    def nats_per_token(self) -> tuple[float, ...]:
        return tuple(nats / n for nats, n in zip(self.nats, self.n_tokens, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "answer": self.answer,
            "chosen": self.chosen,
            "chosen_by_length": self.chosen_by_length,
            "nats": list(self.nats),
            "n_tokens": list(self.n_tokens),
            "n_chars": list(self.n_chars),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChoiceRow:
        return cls(
            data["id"],
            data["answer"],
            tuple(data["nats"]),
            tuple(data["n_tokens"]),
            tuple(data["n_chars"]),
        )


def subset(rows: Sequence[T], limit: int | None, seed: int) -> tuple[T, ...]:
    """`limit` rows drawn with a seed, in the order of the file; all where there are no more."""
    if limit is None or limit >= len(rows):
        return tuple(rows)
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return tuple(rows[index] for index in kept)


def score_choices(
    scorer: Scorer, codec: Codec, questions: Sequence[Question], progress: OnProgress = silent
) -> list[ChoiceRow]:
    """Score every choice of every question; raises ShortstackError for no question at all."""
    if not questions:
        raise ShortstackError("no questions to score. Give a file with rows, or a larger --limit.")
    pairs, owners = [], []
    for question in questions:
        for context, continuation in question.rendered():
            pairs.append(_fitting(scorer, codec, question, context, continuation))
        owners.append(len(question.choices))
    scored = scorer.log_likelihoods(pairs, progress)
    rows, start = [], 0
    for question, count in zip(questions, owners, strict=True):
        part = scored[start : start + count]
        start += count
        rows.append(
            ChoiceRow(
                question.id,
                question.answer,
                tuple(one.sum_nats for one in part),
                tuple(one.n_tokens for one in part),
                tuple(len(choice.strip()) for choice in question.choices),
            )
        )
    return rows


def _fitting(
    scorer: Scorer, codec: Codec, question: Question, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    pair = encode_pair(codec, context, continuation)
    if len(pair[1]) > scorer.max_tokens:
        raise ShortstackError(
            f"question {question.id}: a choice of {len(pair[1])} tokens is longer than the model "
            f"reads ({scorer.max_tokens}). Remove the row."
        )
    return pair
