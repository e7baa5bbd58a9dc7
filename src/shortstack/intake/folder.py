"""A local Hugging Face folder: opened where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.intake import Preview
from shortstack.progress import OnProgress


def identify(target: str) -> dict[str, Any]:
    return {"sha256": Checkpoint.open(Path(target)).sha256}


def open_source(
    target: str, identity: dict[str, Any], work: Path, progress: OnProgress
) -> Checkpoint:
    return Checkpoint.open(Path(target))


def preview(target: str) -> Preview | None:
    return Preview(Checkpoint.open(Path(target)))
