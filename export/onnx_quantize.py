"""Which matrices of a graph get 4 or 8 bits, and the operators that compute with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from shortstack.errors import ShortstackError
from shortstack.export.importance import HEAD
from shortstack.export.onnx_codes import KnownRows
from shortstack.export.onnx_data import DataFile
from shortstack.export.onnx_graph import LAYER, layer_of, names_of
from shortstack.export.onnx_rounding import Floats, quantize_rows
from shortstack.export.onnx_tables import Tables

WIDE = {
    "down": re.compile(r"\bdown_proj\b"),
    "qkv": re.compile(r"\b(qkv|q|k|v)_proj\b"),
}
INPUTS = (("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("gate", "gate_up"), ("up", "gate_up"))
"""Projections, and the fused one that reads the same: builders fuse and split as they like."""
PROJECTION = re.compile(r"\b(\w+)_proj\b")
INT8_PRODUCTS = 4
"""accuracy_level: products in int8; in float they take ten times as long. Of the CPU only: the
CUDA kernels of onnxruntime 1.31 compute in the type of the activations."""
OnWritten = Callable[[int], None]


class Importance:
    """How much each input channel of a projection is used; `missing` are nodes it knows not."""

    def __init__(self, channels: Mapping[str, Floats]) -> None:
        self._layers: dict[tuple[int, str], Floats] = {}
        self._head = channels[HEAD]
        self.missing: list[str] = []
        for name, weights in channels.items():
            layer, projection = LAYER.search(name), PROJECTION.search(name)
            if layer and projection:
                self._layers[int(layer[1]), _read_by(projection[1])] = weights

    def of(self, node: ir.Node) -> Floats | None:
        """By the layer and the projection in the node's names, in every builder's spelling."""
        layer = layer_of(node)
        found = next(filter(None, map(PROJECTION.search, names_of(node))), None)
        weights = None
        if layer is not None and found is not None:
            weights = self._layers.get((layer, _read_by(found[1])))
        if weights is None:
            self.missing.append(str(node.name))
        return weights

    def of_head(self) -> Floats:
        return self._head


def _read_by(projection: str) -> str:
    return dict(INPUTS).get(projection, projection)


@dataclass(frozen=True)
class Quantization:
    """Bits of the body, of the tables and of the projections in `wide`; weights to a scale.

    `half`: scales are float16, for a graph that `to_half` turns afterwards."""

    bits: int
    head_bits: int
    wide: tuple[str, ...]
    block: int
    importance: Importance | None = None
    half: bool = False
    known: KnownRows | None = None
    """Rows whose 8-bit codes are taken as they are."""

    @classmethod
    def of(
        cls,
        bits: int,
        chosen: Mapping[str, str],
        importance: Importance | None = None,
        known: KnownRows | None = None,
    ) -> Quantization:
        head = 4 if chosen.get("head") == "int4" else 8
        wide = tuple(part for part in chosen.get("wide", "none").split("+") if part != "none")
        return cls(
            bits, head, wide, int(chosen["block"]), importance, half_activations(chosen), known
        )

    def bits_of(self, node: ir.Node) -> int:
        wide = any(WIDE[part].search(name) for part in self.wide for name in names_of(node))
        return 8 if wide else self.bits

    def weights_of(self, node: ir.Node, head: ir.Node, bits: int) -> Floats | None:
        """Importance of the columns of a product's matrix. Rounding to 8 bits does without: its
        error is a hundredth of what 4 bits leave."""
        if self.importance is None or bits == 8:
            return None
        return self.importance.of_head() if node is head else self.importance.of(node)


def half_activations(chosen: Mapping[str, str]) -> bool:
    return chosen.get("activations") == "float16"


def quantize(
    graph: ir.Graph, tables: Tables, how: Quantization, data: DataFile, written: OnWritten
) -> None:
    """Put every matrix of the graph, embedding and head too, into `data` as blocks of integers."""
    table = tables.gather.inputs[0]
    assert table is not None
    # an untied table is only looked up: its columns meet no inputs
    weights = how.weights_of(tables.head, tables.head, how.head_bits) if tables.tied else None
    embedding = _put(graph, table, how, how.head_bits, data, weights, turned=False)
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
            weights = how.weights_of(node, tables.head, bits)
            matrix = _put(graph, weight, how, bits, data, weights, turned=True)
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
    graph: ir.Graph,
    source: ir.Value,
    how: Quantization,
    bits: int,
    data: DataFile,
    weights: Floats | None,
    *,
    turned: bool,
) -> Quantized:
    """Round an initializer, transposed if `turned`, and write it.

    Raises ShortstackError for a scale that float16 does not hold.
    """
    stored, name = source.const_value, str(source.name)
    assert stored is not None
    matrix = stored.numpy().T if turned else stored.numpy()
    kept = how.known.of(name, matrix, how.block, half=how.half) if how.known and bits == 8 else None
    codes, scales = kept or quantize_rows(matrix, how.block, bits, weights, half=how.half)
    if how.half and np.isinf(scales).any():
        raise ShortstackError(
            f"{name}: a block's weights are so large that float16 does not hold their scale. "
            "Export with activations=float32."
        )
    values = [
        register(graph, data.add(f"{name}.{suffix}", array))
        for suffix, array in (("codes", codes), ("scales", scales))
    ]
    rows, width = matrix.shape
    return Quantized(values[0], values[1], rows, width, how.block, bits)


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
