"""Where rows of a data set lie: DIR/DOMAIN/SET/SPLIT.jsonl, or the same with .gz."""

from __future__ import annotations

from pathlib import Path

from shortstack.questions import Question, open_questions


def file_of(data: Path, name: str, split: str) -> Path:
    """The rows of `split` (train, validation, test) of the set `name`, as general/piqa; stops the
    benchmark where there are none."""
    found = _found(data, name, split)
    if found is None:
        raise SystemExit(f"no {split} rows of {name} in {data}")
    return found


def questions(data: Path, name: str, split: str) -> list[Question]:
    """The questions of a split; none where the set has no such split."""
    file = _found(data, name, split)
    return [] if file is None else list(open_questions(file))


def _found(data: Path, name: str, split: str) -> Path | None:
    files = (data / name / f"{split}.jsonl", data / name / f"{split}.jsonl.gz")
    return next((file for file in files if file.is_file()), None)
