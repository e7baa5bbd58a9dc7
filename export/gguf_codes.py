"""Row codes as GGUF Q8_0: each block of 32 weights keeps its codes, its scale is the row's step.

A Q8_0 block (ggml-common.h, block_q8_0) is a float16 scale d and 32 int8 codes, its weights are
d times the codes: no weight changes, and any llama.cpp runs the file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export.weights import Array, interleave_rope
from shortstack.row_codes import RowCodes

PRECISION = "Q8_0"
BLOCK, BLOCK_BYTES = 32, 34


def keeps_codes(checkpoint: Checkpoint, spec: ExportSpec) -> bool:
    """Whether the export takes the sidecar's codes as they are."""
    return spec.precision == PRECISION and (checkpoint.path / SIDECAR).is_file()


def check_codes(
    checkpoint: Checkpoint, spec: ExportSpec, changed: list[str], coded: Collection[str]
) -> None:
    """Raise ShortstackError where llama.cpp cannot hold the codes. `changed`: tensors that the file
    holds scaled or shifted."""
    remedy = f"Remove {SIDECAR} to have the weights rounded anew."
    if spec.options:
        raise ShortstackError(
            f"the option {spec.options[0][0]} does not go with row codes, which are kept as they "
            f"are. Leave it out. {remedy}"
        )
    for name in sorted(coded):
        width = checkpoint.tensors[name].shape[1]
        if width % BLOCK:
            raise ShortstackError(
                f"{name} has rows of {width}, Q8_0 needs multiples of {BLOCK} to keep its codes. "
                f"Export to onnx:int8. {remedy}"
            )
        if name in changed:
            raise ShortstackError(
                f"llama.cpp wants {name} scaled, which its codes and float16 steps cannot hold "
                f"exactly. Export to onnx:int8. {remedy}"
            )


def fill_blocks(out: NDArray[np.uint8], rows: RowCodes, heads: int) -> None:
    """Write rows as blocks into the bytes `out`; rows of `heads` heads become rotation pairs."""
    codes: Array = interleave_rope(rows.codes, heads) if heads else rows.codes
    steps: Array = interleave_rope(rows.steps, heads) if heads else rows.steps
    blocks = out.reshape(codes.shape[0], -1, BLOCK_BYTES)
    scale = np.ascontiguousarray(steps, "<f2").view(np.uint8).reshape(-1, 1, 2)
    blocks[:, :, :2] = scale
    blocks[:, :, 2:] = codes.view(np.uint8).reshape(codes.shape[0], -1, BLOCK)


def quantize_blocks(out: NDArray[np.uint8], rows: NDArray[np.float32]) -> None:
    """Round rows that have no codes, as llama.cpp's reference does."""
    from shortstack.export.gguf_write import gguf_package

    gguf: Any = gguf_package()
    kind = gguf.GGMLQuantizationType[PRECISION]
    out[:] = gguf.quants.quantize(np.ascontiguousarray(rows), kind).reshape(-1)
