"""Packed files and runtimes: what opens them, and the folder that a proof opens instead."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shortstack.artifact import Artifact
from shortstack.checkpoint import Checkpoint
from shortstack.errors import require
from shortstack.packed.read import open_packed
from shortstack.packed.unpack import unpack_folder

PACKED = "pytorch-packed"
"""The runtime that opens packed files as they lie."""


def check_runnable() -> None:
    """Raise MissingExtraError where packages are missing that a packed file runs with."""
    require(("torch", "transformers"), "prune", "running a packed model")
    require(("zstandard",), "pack", "running a packed model")


def preview_of(path: Path) -> Checkpoint:
    """What a packed file says of the checkpoint it holds, from its header: config, types, shapes.

    Raises ShortstackError for one that is damaged or none.
    """
    from shortstack.intake.packed_file import preview

    found = preview(str(path))
    assert found is not None
    return found.checkpoint


@contextmanager
def runnable(artifact: Artifact) -> Iterator[tuple[Path, str]]:
    """(path, format) for `runtimes_for`. A packed file is proven by the very folder it unpacks to,
    which lies beside it for as long as the block lasts: in float32, as every proof."""
    if artifact.format != "packed":
        yield artifact.path, artifact.format
        return
    folder = artifact.path.with_name(f".{artifact.path.name}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)  # what a hard kill left
    try:
        folder.mkdir()
        unpack_folder(open_packed(artifact.path), folder)
        yield folder, "checkpoint"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
