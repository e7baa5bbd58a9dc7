"""Blockwise rounding to 4 or 8 bits, and the operators of onnxruntime that compute with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from shortstack.export.onnx_data import DataFile
from shortstack.export.onnx_graph import names_of
from shortstack.export.onnx_tables import Tables
from shortstack.export.to_onnx import ROUNDED_AT_ONCE

WIDE = {
    "down": re.compile(r"\bdown_proj\b"),
    "qkv": re.compile(r"\b(qkv|q|k|v)_proj\b"),
}
INT8_PRODUCTS = 4
"""accuracy_level: products in int8; in float they take ten times as long."""
Codes = tuple[NDArray[np.uint8], NDArray[np.float32]]
OnWritten = Callable[[int], None]


@dataclass(frozen=True)
class Quantization:
    """Bits of the body, of the tables and of the projections in `wide`; weights to a scale."""

    bits: int
    head_bits: int
    wide: tuple[str, ...]
    block: int

    @classmethod
    def of(cls, bits: int, chosen: Mapping[str, str]) -> Quantization:
        head = 4 if chosen.get("head") == "int4" else 8
        wide = tuple(part for part in chosen.get("wide", "none").split("+") if part != "none")
        return cls(bits, head, wide, int(chosen["block"]))

    def bits_of(self, node: ir.Node) -> int:
        wide = any(WIDE[part].search(name) for part in self.wide for name in names_of(node))
        return 8 if wide else self.bits


def quantize_rows(table: NDArray[Any], block: int, bits: int) -> Codes:
    """Round each `block` of a row: w ≈ scale · (q - z), z = 2^(bits - 1), scale = w* / -z.

    w* is the block's weight of largest magnitude, so that it is exact. Returns codes
    (rows, blocks, block * bits / 8), two 4-bit codes to a byte, the first in the low half, and
    scales (rows, blocks).
    """
    zero = 1 << (bits - 1)
    rows, width = table.shape
    codes = np.empty((rows, width // block, block * bits // 8), np.uint8)
    scales = np.empty((rows, width // block), np.float32)
    step = max(1, ROUNDED_AT_ONCE // width)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        blocks = np.ascontiguousarray(table[part], np.float32).reshape(-1, width // block, block)
        low, high = blocks.min(-1), blocks.max(-1)
        scales[part] = np.where(-low >= high, low, high) / np.float32(-zero)
        safe = np.where(scales[part] == 0, np.float32(1), scales[part])
        steps = np.rint(blocks / safe[..., None]) + np.float32(zero)
        whole = np.clip(steps, 0, 2 * zero - 1).astype(np.uint8)
        codes[part] = whole if bits == 8 else whole[..., ::2] | (whole[..., 1::2] << 4)
    return codes, scales


def quantize(
    graph: ir.Graph, tables: Tables, how: Quantization, data: DataFile, written: OnWritten
) -> None:
    """Put every matrix of the graph, embedding and head too, into `data` as blocks of integers."""
    table = tables.gather.inputs[0]
    assert table is not None
    embedding = _put(graph, table, how.block, how.head_bits, data, turned=False)
    _replace_gather(graph, tables.gather, embedding)
    written(embedding.n_weights)
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None:
            continue
        if node is tables.head and tables.tied:
            _replace_product(graph, node, embedding)
        elif weight.const_value is not None and len(weight.const_value.shape) == 2:
            bits = how.head_bits if node is tables.head else how.bits_of(node)
            matrix = _put(graph, weight, how.block, bits, data, turned=True)
            _replace_product(graph, node, matrix)
            written(matrix.n_weights)


@dataclass(frozen=True)
class Quantized:
    """A matrix (rows, width) in blocks along its rows: where its codes and scales are."""

    codes: ir.Value
    scales: ir.Value
    rows: int
    width: int
    block: int
    bits: int

    @property
    def n_weights(self) -> int:
        return self.rows * self.width


def _put(
    graph: ir.Graph, source: ir.Value, block: int, bits: int, data: DataFile, *, turned: bool
) -> Quantized:
    """Round an initializer, transposed if `turned`, and write it."""
    stored, name = source.const_value, str(source.name)
    assert stored is not None
    matrix = stored.numpy().T if turned else stored.numpy()
    codes, scales = quantize_rows(matrix, block, bits)
    values = [
        register(graph, data.add(f"{name}.{suffix}", array))
        for suffix, array in (("codes", codes), ("scales", scales))
    ]
    rows, width = matrix.shape
    return Quantized(values[0], values[1], rows, width, block, bits)


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.val(str(tensor.name), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace_product(graph: ir.Graph, node: ir.Node, matrix: Quantized) -> None:
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], matrix.codes, matrix.scales],
        {
            "K": matrix.width,
            "N": matrix.rows,
            "bits": matrix.bits,
            "block_size": matrix.block,
            "accuracy_level": INT8_PRODUCTS,
        },
        domain="com.microsoft",
        name=node.name,
    )
    _replace(graph, node, [product])


def _replace_gather(graph: ir.Graph, node: ir.Node, table: Quantized) -> None:
    """The operator reads codes (rows, bytes), a product with the same table (rows, blocks, …)."""
    n_bytes = table.width * table.bits // 8
    name = f"{table.codes.name}.shape"
    shape = register(graph, ir.tensor(np.array([table.rows, n_bytes], np.int64), name=name))
    flat = ir.node("Reshape", [table.codes, shape], name=f"{node.name}/Reshape")
    lookup = ir.node(
        "GatherBlockQuantized",
        [flat.outputs[0], node.inputs[1], table.scales],
        {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 1},
        domain="com.microsoft",
        name=node.name,
    )
    _replace(graph, node, [flat, lookup])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last of them makes its result, under its name."""
    before, after = old.outputs[0], new[-1].outputs[0]
    after.type, after.shape, name = before.type, before.shape, before.name
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name
