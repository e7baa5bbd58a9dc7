"""Read a built graph: whose layer a node is, where the tables are, what one token takes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import onnx_ir as ir

from shortstack.multiplied import Multiplied

CACHE = re.compile(r"^(past_key_values|present)\.(\d+)\.(key|value)$")
LAYER = re.compile(r"\blayers\.(\d+)\b")

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

SKIP_NORM = "SkipSimplifiedLayerNormalization"

VIEWS = {"Reshape", "Transpose", "Identity"}
"""Done once, when the file is opened; what counts is who reads their output."""


def names_of(node: ir.Node) -> tuple[str, ...]:
    """The names by which builders tell what a node is: its own and its weights'."""
    weights = (str(v.name) for v in node.inputs if v is not None and v.is_initializer())
    return (str(node.name), *weights)


def layer_of(node: ir.Node) -> int | None:
    """The layer that a node's names speak of."""
    found = (LAYER.search(name) for name in names_of(node))
    return next((int(match[1]) for match in found if match), None)


def forget_unused(graph: ir.Graph) -> None:
    """Take the names from optional outputs that nobody reads, so that they are not computed.

    mobius names mean and deviation of each fused norm: a third of its time in onnxruntime 1.31.
    """
    for node in graph:
        if node.op_type == SKIP_NORM:
            for value in node.outputs[1:3]:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""


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


PRODUCTS = {
    *("MatMul", "Gemm", "FusedMatMul", "MatMulNBits"),
    *("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
}
UNREAD = {"MoE", "QMoE", "Attention"}
"""Multiply weights in ways that are not read here; ONNX's own Attention has none."""
ON_THE_WAY = {*VIEWS, "Cast", "DequantizeLinear"}
"""Between a stored weight and the product that it goes into."""


def multiplied_params(model_file: Path) -> Multiplied:
    """Parameters of products with a stored matrix; the head's is the last before `logits`.

    Not known where there is no such head, or an operator whose weights are not read here.
    """
    graph = ir.load(model_file).graph
    if any(node.op_type in UNREAD and node.domain for node in graph):
        return Multiplied()
    sizes = {node: size for node in graph if (size := _matrix_size(node))}
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    heads = _last_products(None if logits is None else logits.producer(), sizes)
    if len(heads) != 1:
        return Multiplied()
    head = sizes[heads.pop()]
    return Multiplied(sum(sizes.values()) - head, head)


def _matrix_size(node: ir.Node) -> int:
    """Parameters of the stored matrix that the node multiplies with; 0 where there is none."""
    if node.op_type not in PRODUCTS:
        return 0
    if node.op_type == "MatMulNBits":  # several weights a byte: its attributes have the shape
        return node.attributes["N"].as_int() * node.attributes["K"].as_int()
    shapes = (_stored_shape(value) for value in node.inputs[:2])
    return next((math.prod(s) for s in shapes if sum(width > 1 for width in s) > 1), 0)


def _stored_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Of the weight that the value is; empty for what is computed."""
    while value is not None and value.const_value is None:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in ON_THE_WAY else None
    tensor = None if value is None else value.const_value
    return () if tensor is None else tuple(tensor.shape.numpy())


def _last_products(end: ir.Node | None, sizes: dict[ir.Node, int]) -> set[ir.Node]:
    """The nodes of `sizes` that `end` depends on without another of them between."""
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    waiting = [] if end is None else [end]
    while waiting:
        node = waiting.pop()
        if node in sizes:
            found.add(node)
        elif node not in seen:
            seen.add(node)
            before = (value.producer() for value in node.inputs if value is not None)
            waiting += [one for one in before if one is not None]
    return found
