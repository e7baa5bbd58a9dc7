"""From the sidecar to a Hugging Face folder that every other tool reads as any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.disk import require_space
from shortstack.floats import to_stored
from shortstack.prune.quantize.matrices import BLOCK_WEIGHTS
from shortstack.prune.rewrite import finish
from shortstack.row_codes import RowCodes, RowCodesReader
from shortstack.shards import Layout, ShardReader, ShardWriter, lay_out


def layout_of(checkpoint: Checkpoint, names: tuple[str, ...]) -> Layout:
    """Shards of the result: the matrices `names` in float32, all else in the type it has."""
    wide = set(names)
    tensors = checkpoint.tensors.items()
    return lay_out(
        (name, "F32" if name in wide else info.dtype, info.shape) for name, info in tensors
    )


def write_folder(
    checkpoint: Checkpoint, out: Path, changed: Mapping[str, NDArray[np.float32]]
) -> Checkpoint:
    """Write the weights that the sidecar in `out` says, and everything else of `checkpoint`,
    `changed` tensors in the type they were stored in.

    Tokenizer files and the plan of an earlier cut are copied byte for byte. Raises ShortstackError
    for a full disk.
    """
    sidecar = RowCodesReader(out)
    layout = layout_of(checkpoint, sidecar.names)
    require_space(out, layout.n_bytes)
    with ShardReader(checkpoint) as reader, ShardWriter(out, layout) as writer:
        for name in writer.names:
            if name in sidecar.shapes:
                writer.write(name, _blocks(sidecar.read(name)))
            elif name in changed:
                writer.write(name, [to_stored(changed[name], checkpoint.tensors[name].dtype)])
            else:
                writer.write(name, reader.chunks(name))
    return finish(checkpoint, out, _config(checkpoint))


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config with float32 as the type: a bfloat16 would not hold the products."""
    config = dict(checkpoint.config)
    nested = checkpoint.family.nested
    for level in (config, config[nested]) if nested else (config,):
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = "float32"
    return config


def _blocks(matrix: RowCodes) -> Iterator[memoryview]:
    step = max(1, BLOCK_WEIGHTS // matrix.codes.shape[1])
    for start in range(0, len(matrix.steps), step):
        part = RowCodes(matrix.codes[start : start + step], matrix.steps[start : start + step])
        yield to_stored(part.weights(), "F32")
