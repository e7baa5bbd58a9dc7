"""Read and mend the graphs that the builder writes, tensors left in their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

EMBED = "/model/embed_tokens/Gather"
HEAD = "/lm_head/MatMul_Q8"

GATHERED = {
    ("Gather", 0),
    ("GatherBlockQuantized", 0),
    ("GatherBlockQuantized", 2),
    ("GatherBlockQuantized", 3),
    ("GroupQueryAttention", 7),
    ("GroupQueryAttention", 8),
    ("RotaryEmbedding", 2),
    ("RotaryEmbedding", 3),
}
"""(operator, input) that reads one row of a table a token, not the table."""

VIEWS = {"Reshape", "Transpose", "Identity"}
"""Done once, when the file is opened; what counts is who reads their output."""


def bytes_per_token(model_file: Path) -> int:
    """Bytes of every weight that one decoded token reads whole."""
    graph = ir.load(model_file).graph
    return sum(
        math.ceil(value.const_value.nbytes)
        for value in graph.initializers.values()
        if value.const_value is not None and _read_whole(value)
    )


def _read_whole(value: ir.Value) -> bool:
    for node, place in value.uses():
        if node.op_type in VIEWS and place == 0:
            if _read_whole(node.outputs[0]):
                return True
        elif (node.op_type, place) not in GATHERED:
            return True
    return False


def write_with_int8_embedding(source: Path, target: Path, *, tied: bool, block: int) -> None:
    """Copy a model with an 8-bit head; gather the embedding from 8 bits, too.

    The builder shares a 4-bit table with a tied embedding, but beside an 8-bit head it writes the
    embedding as float32: on a small model that doubles the file. If `tied`, both read one table.
    """
    model = ir.load(source)
    graph = model.graph
    gather, head = (next(n for n in graph if n.name == name) for name in (EMBED, HEAD))
    table, tokens = gather.inputs
    assert table is not None
    assert table.const_value is not None
    stored = table.const_value.numpy()
    rows, width = stored.shape
    if tied:
        quantized = [head.inputs[1], head.inputs[2], *head.inputs[3:4]]
    else:
        codes, scales = quantize_rows(stored, block)
        quantized = [
            _initializer(graph, "embed_tokens.q8", codes),
            _initializer(graph, "embed_tokens.scales", scales),
        ]
    shape = _initializer(graph, "embed_tokens.shape", np.array([rows, width], np.int64))
    flat = ir.node("Reshape", [quantized[0], shape], name="/model/embed_tokens/Reshape")
    lookup = ir.node(
        "GatherBlockQuantized",
        [flat.outputs[0], tokens, *quantized[1:]],
        {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        domain="com.microsoft",
        name="/model/embed_tokens/GatherBlockQuantized",
        outputs=[ir.val("embed_tokens.output")],
    )
    graph.insert_before(gather, [flat, lookup])
    gather.outputs[0].replace_all_uses_with(lookup.outputs[0])
    graph.remove(gather, safe=True)
    del graph.initializers[str(table.name)]
    ir.save(model, target, external_data=f"{target.name}.data")


def _initializer(graph: Any, name: str, array: NDArray[Any]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def quantize_rows(
    table: NDArray[np.float32], block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round each `block` of a row to 8 bits: w ≈ scale · (q - 128), scale = w* / -128.

    w* is the block's weight of largest magnitude, so that it is exact. Returns codes
    (rows, blocks, block) and scales (rows, blocks).
    """
    blocks = table.reshape(table.shape[0], -1, block)
    largest = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scales = np.take_along_axis(blocks, largest, axis=-1) / np.float32(-128)
    safe = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(blocks / safe) + 128, 0, 255).astype(np.uint8)
    return codes, scales[..., 0]
