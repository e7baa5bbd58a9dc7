"""What a runtime opens of an artifact: of a packed file the folder that it unpacks to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shortstack.artifact import Artifact
from shortstack.errors import ShortstackError
from shortstack.packed.read import open_packed
from shortstack.packed.unpack import unpack_folder


def refuse_packed(path: Path) -> None:
    """Raise ShortstackError for a packed file where a runtime is to open it as it lies."""
    if path.is_file() and path.suffix == ".safetensors":
        raise ShortstackError(
            f"{path} is packed: no runtime computes with coded weights. Unpack it first: "
            f"shortstack unpack {path} -o FOLDER"
        )


@contextmanager
def runnable(artifact: Artifact) -> Iterator[tuple[Path, str]]:
    """(path, format) for `runtimes_for`. No runtime reads coded weights: a packed file is unpacked
    into a folder beside it, for as long as the block lasts."""
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
