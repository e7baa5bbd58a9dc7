"""A packed file -> the Hugging Face folder it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint, TensorInfo
from shortstack.disk import disk_errors
from shortstack.errors import ShortstackError
from shortstack.intake import Preview
from shortstack.manifest import finished, staged, step_key, write_manifest
from shortstack.packed.header import damaged
from shortstack.packed.read import Packed, open_packed, read_whole
from shortstack.packed.unpack import unpack_folder
from shortstack.progress import OnProgress


def identify(target: str) -> dict[str, Any]:
    """The checksum of the header, which holds those of all that is in the file."""
    return {"packed_sha256": open_packed(Path(target)).sha256}


def open_source(
    target: str, identity: dict[str, Any], work: Path, progress: OnProgress
) -> Checkpoint:
    key = step_key("intake", identity)
    if finished(work, key) is None:
        packed = open_packed(Path(target))
        with disk_errors(work), staged(work, "intake") as out:
            unpack_folder(packed, out, progress)
            write_manifest(out, "intake", key, {"source": {"file": Path(target).name, **identity}})
    return Checkpoint.open(work)


def preview(target: str) -> Preview | None:
    packed = open_packed(Path(target))
    tensors = {
        name: TensorInfo("", entry.dtype, entry.shape)
        for name, entry in packed.contents.tensors.items()
    }
    config = read_config(packed)
    return Preview(Checkpoint(Path(target).parent, config, tensors), packed.contents.plain_bytes)


def read_config(packed: Packed) -> dict[str, Any]:
    """The model's config.json. Raises ShortstackError where the file has none."""
    for entry in packed.contents.entries:
        if entry.blob == "file:config.json":
            try:
                config = json.loads(read_whole(packed, entry))
            except ValueError:
                raise damaged(str(packed.path), "config.json is no JSON") from None
            if isinstance(config, dict):
                return config
    raise ShortstackError(f"{packed.path} holds no config.json: it is no packed model.")
