"""Multiple choice by log-likelihood: the answer is the likeliest continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.evaluate import metrics
from shortstack.evaluate.codec import Codec, encode_pair
from shortstack.evaluate.scorer import Scorer
from shortstack.evaluate.sets import Row, SetSpec
from shortstack.evaluate.subsets import subset
from shortstack.progress import OnProgress, silent
from shortstack.questions import Question, open_questions

METRICS = ("accuracy", "accuracy_by_length", "macro_f1")


@dataclass(frozen=True)
class ChoiceRow:
    """One question under a model: nats and tokens of each choice, its length in characters."""

    id: str
    answer: int
    nats: tuple[float, ...]
    n_tokens: tuple[int, ...]
    n_chars: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    """Where all questions of a set have the same choices: which of the sorted ones each is."""

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
            "labels": None if self.labels is None else list(self.labels),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChoiceRow:
        return cls(
            data["id"],
            data["answer"],
            tuple(data["nats"]),
            tuple(data["n_tokens"]),
            tuple(data["n_chars"]),
            None if data["labels"] is None else tuple(data["labels"]),
        )


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
    labels = _labels(questions)
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
                _label_ids(labels, question),
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


def _labels(questions: Sequence[Question]) -> dict[str, int] | None:
    """The classes, if the questions have the same choices: positive, negative, neutral."""
    sets = {frozenset(question.choices) for question in questions}
    if len(sets) > 1 or len(questions) < 2:
        return None
    return {choice: index for index, choice in enumerate(sorted(next(iter(sets))))}


def _label_ids(labels: dict[str, int] | None, question: Question) -> tuple[int, ...] | None:
    return None if labels is None else tuple(labels[choice] for choice in question.choices)


def check(path: Path, metric: str) -> None:
    """Raises ShortstackError for a file whose rows are no questions."""
    open_questions(path)


def score(
    scorer: Scorer, codec: Codec, spec: SetSpec, seed: int, progress: OnProgress
) -> list[Row]:
    questions = subset(open_questions(spec.path), spec.limit, seed)
    return [row.to_dict() for row in score_choices(scorer, codec, questions, progress)]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy both ways with Wilson's interval, chance, majority; macro-F1 where there are
    classes (bootstrap over rows)."""
    scored = [ChoiceRow.from_dict(row) for row in rows]
    n = len(scored)
    classes = [_classes(row) for row in scored]
    answers = [answer for answer, _ in classes]
    found = {
        "n": n,
        "accuracy": metrics.wilson(sum(row.right for row in scored), n).to_dict(),
        "accuracy_by_length": metrics.wilson(sum(r.right_by_length for r in scored), n).to_dict(),
        "chance": metrics.chance([len(row.nats) for row in scored]),
        "majority": metrics.majority(answers),
    }
    if scored[0].labels is not None:
        said = [prediction for _, prediction in classes]
        found["macro_f1"] = metrics.macro_f1_interval(answers, said).to_dict()
    return found


def _classes(row: ChoiceRow) -> tuple[int, int]:
    """(right class, chosen class); without classes the positions."""
    if row.labels is None:
        return row.answer, row.chosen
    return row.labels[row.answer], row.labels[row.chosen]


def compare(original: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy lost or won on the same rows, and the stability of LLM-Streamline."""
    first = [ChoiceRow.from_dict(row) for row in original]
    second = [ChoiceRow.from_dict(row) for row in rows]
    right = [row.right for row in first], [row.right for row in second]
    nats = [row.nats_per_token for row in first]
    weights, by_exp = metrics.stability_weights(nats), metrics.stability_weights(nats, exp=True)
    return {
        "difference": metrics.paired_difference(*right).to_dict(),
        "stability": metrics.stability(weights, *right),
        "stability_n": metrics.effective_n(weights),
        "stability_exp": metrics.stability(by_exp, *right),
        "stability_exp_n": metrics.effective_n(by_exp),
        "same_answer": float(
            sum(a.chosen == b.chosen for a, b in zip(first, second, strict=True)) / len(first)
        ),
    }
