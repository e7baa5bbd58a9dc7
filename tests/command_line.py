"""What tests of the command line share: commands that fail, recipes, changed copies of a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.cli import main


def copy(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def change_config(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **fields}))
    return folder


def fails(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail; return its one line."""
    assert main(args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("shortstack: ")
    return lines[0]


def shortstack(
    *args: str, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shortstack", *args, "--quiet"],
        capture_output=True,
        text=True,
        preexec_fn=before,
        timeout=300,
        check=False,
    )


def write_recipe(folder: Path, tiny: Path, **changes: object) -> Path:
    """JSON is YAML."""
    data = {
        "model": str(tiny),
        "text": "spdx",
        "prune": {"method": "explicit", "drop": "2"},
        "export": [{"to": "gguf:F16"}],
        "verify": {"windows": 2, "window_tokens": 32, "decode_tokens": 8},
        "bench": {"prompt_tokens": 8, "decode_tokens": 4, "repeats": 2, "threads": 1},
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(data))
    return file
