"""The tiny model in every format, and rows of every kind of set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter

TEXT = Path(__file__).parent.parent.parent / "LICENSE"


@pytest.fixture(scope="session")
def exports(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as a checkpoint, a GGUF file, an ONNX folder and a packed file, float32."""
    found = {"checkpoint": tiny}
    for text in ("gguf:F32", "onnx:fp32", "packed"):
        spec = ExportSpec.parse(text)
        folder = tmp_path_factory.mktemp(spec.format)
        found[spec.format] = exporter(spec.format).export(Checkpoint.open(tiny), spec, folder).path
    return found


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind, from licence text, on which the tiny model was trained."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [line.strip() for line in TEXT.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line.split()) > 6][:24]
    questions = [
        {
            "id": f"q{at}",
            "question": " ".join(line.split()[:-2]),
            "choices": [
                " ".join(lines[(at + k) % len(lines)].split()[-2:]) for k in range(2 + at % 3)
            ],
            "answer": at % 2,
        }
        for at, line in enumerate(lines)
    ]
    for question in questions:  # the right ending at its place
        choices: Any = question["choices"]
        right = choices.pop(0)
        choices.insert(question["answer"], right)
    classes = [
        {"question": line, "choices": ["positive", "negative", "neutral"], "answer": at % 3}
        for at, line in enumerate(lines)
    ]
    return {
        "choice": write_rows(folder / "licence" / "choice.jsonl", questions),
        "classes": write_rows(folder / "licence" / "classes.jsonl", classes),
        "text": write_rows(folder / "licence" / "text.jsonl", [{"text": TEXT.read_text()}]),
        "generation": write_rows(
            folder / "licence" / "generation.jsonl",
            [{"text": line, "target": line.split()[-1]} for line in lines],
        ),
    }
