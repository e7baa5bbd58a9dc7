"""Multiple-choice questions: what a domain's accuracy is scored, tuned and tested on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, one_line
from shortstack.rows import is_jsonl, read_rows

SLOT = "_"
"""In a question whose choices fill a gap (WinoGrande): where the choice goes."""


@dataclass(frozen=True)
class Question:
    """One question with its choices; `answer` is the index of the right one, from 0."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""

    def rendered(self) -> tuple[tuple[str, str], ...]:
        """(prompt, continuation) for each choice: the model's choice is the likeliest continuation.

        The choice itself is the continuation, not a letter: a letter tests the format, and a small
        model fails that first. Where the choices fill a gap, the prompt ends in the choice and the
        continuation is the rest of the sentence, the same for all.
        """
        if self._has_gap:
            before, _, after = self.question.partition(SLOT)
            return tuple((before + choice, after) for choice in self.choices)
        head = f"{self.context.strip()}\n" if self.context else ""
        prompt = f"{head}Question: {self.question.strip()}\nAnswer:"
        return tuple((prompt, f" {choice.strip()}") for choice in self.choices)

    @property
    def _has_gap(self) -> bool:
        parts = self.question.split()
        slots = sum(part.strip(".,;:!?'\"") == SLOT for part in parts)
        return slots == 1 and not self.question.rstrip().endswith(SLOT)

    @property
    def key(self) -> str:
        """Equal for the same question in two files, whatever its id, case and white space."""
        parts = (self.context, self.question, *self.choices)
        return "\n".join(" ".join(part.casefold().split()) for part in parts)


def open_questions(path: Path) -> tuple[Question, ...]:
    """Read JSONL rows `question`, `choices`, `answer` (index from 0), optional `context`, `id`.

    Raises ShortstackError, naming file and line, for another file type, a missing column, a wrong
    type, an answer outside the choices, repeated choices, and for an empty file.
    """
    if not is_jsonl(path):
        raise ShortstackError(f"{path} is not .jsonl. Give one JSON object a line.")
    found = tuple(_question(path, number, row) for number, row in read_rows(path))
    if not found:
        raise ShortstackError(f"{path} holds no questions. Give one JSON object a line.")
    return found


def _question(path: Path, number: int, row: Mapping[str, Any]) -> Question:
    where = f"{path}, line {number}"
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ShortstackError(
            f"{where}: no string field 'question'. Columns: question, choices, answer."
        )
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise ShortstackError(f"{where}: 'choices' is no list of two or more texts. Mend the row.")
    if len({choice.strip() for choice in choices}) != len(choices):
        raise ShortstackError(f"{where}: 'choices' holds one text twice. Mend or remove the row.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ShortstackError(
            f"{where}: 'answer' must be an index from 0 to {len(choices) - 1}, got {answer!r}."
        )
    context = row.get("context") or ""
    if not isinstance(context, str):
        raise ShortstackError(f"{where}: 'context' is no text. Mend or remove the row.")
    return Question(str(row.get("id", number)), question, tuple(choices), answer, context)


def refuse_leaks(parts: Mapping[str, Sequence[Question]]) -> None:
    """Raise ShortstackError if two parts (`tune`, `scan`, `test`) share a question.

    What was tuned or scanned on proves nothing when it is tested on.
    """
    asked = {name: {row.key: row.question for row in rows} for name, rows in parts.items()}
    for first, second in itertools.combinations(parts, 2):
        shared = asked[first].keys() & asked[second].keys()
        if shared:
            example = one_line(asked[first][min(shared)], 60)
            raise ShortstackError(
                f"the {first} and {second} rows share {len(shared)} questions, such as "
                f"'{example}': a leak. Remove them from one of the two."
            )
