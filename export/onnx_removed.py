"""Leave removed sub-blocks out of a built graph: nodes, weights and caches."""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shortstack.checkpoint import Checkpoint
from shortstack.errors import VerificationError
from shortstack.export.onnx_graph import CACHE, SKIP_NORM, layer_of, names_of
from shortstack.families.table import Part

OUTPUTS: dict[Part, re.Pattern[str]] = {
    "attention": re.compile(r"\bo_proj\b"),
    "mlp": re.compile(r"\bdown_proj\b"),
}
"""How builders name the product whose result a sub-block adds to the residual stream."""

STAYS_ZERO = {"Div", "Reshape", "Cast", "RMSNormalization", "SimplifiedLayerNormalization"}
"""Operators whose result is zero where their first input is (a norm of zeros is 0 / epsilon); a
product is zero where either is."""

ANOTHER = "Try another builder: --option builder=mobius"


def drop_removed(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Cut what a removed sub-block computes out of the graph: its output projection is zero.

    The zeros are followed to where they are added to the residual stream, and the addition goes.
    Raises VerificationError where a graph does something else with them.
    """
    if not any(checkpoint.removed.values()):
        return
    zero: set[ir.Value] = set()
    for node in list(model.graph):
        if any(_writes(node, part, layers) for part, layers in checkpoint.removed.items()):
            zero.add(node.outputs[0])
        elif zero.intersection(value for value in node.inputs if value is not None):
            _follow(model.graph, node, zero)
    _drop_caches(model, checkpoint.removed["attention"])
    _check(model, checkpoint)


def _writes(node: ir.Node, part: Part, layers: tuple[int, ...]) -> bool:
    """Whether the node is the output projection of a sub-block of one of the layers."""
    return (
        node.op_type == "MatMul"
        and layer_of(node) in layers
        and any(OUTPUTS[part].search(name) for name in names_of(node))
    )


def _follow(graph: ir.Graph, node: ir.Node, zero: set[ir.Value]) -> None:
    """Replace a sum with zeros by its other term; let zeros through what keeps them zero.

    Anything else is left to compute what it will: if it is needed, `_check` finds it.
    """
    first, second = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    other = second if first in zero else first
    if node.op_type == "Mul" or (node.op_type in STAYS_ZERO and first in zero):
        zero.add(node.outputs[0])
    elif node.op_type == "Add" and other is not None:
        if other in zero or (other.const_value is not None and not other.const_value.numpy().any()):
            zero.add(node.outputs[0])  # a bias that is zero, as check_removed has seen
        elif other.const_value is None:
            node.outputs[0].replace_all_uses_with(other, replace_graph_outputs=True)
    elif node.op_type == SKIP_NORM and other is not None and other not in zero:
        _unskip(graph, node, other)


def _unskip(graph: ir.Graph, node: ir.Node, other: ir.Value) -> None:
    """norm(other + 0) and other + 0: the fused operator's first and last output."""
    new = graph.opset_imports.get("", 0) >= 23
    norm = ir.node(
        "RMSNormalization" if new else "SimplifiedLayerNormalization",
        [other, node.inputs[2]],
        {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-5), "stash_type": 1},
        name=f"{node.name}/norm",
    )
    norm.outputs[0].type, norm.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, norm)
    node.outputs[0].replace_all_uses_with(norm.outputs[0])
    for total in node.outputs[3:]:
        total.replace_all_uses_with(other)


def _drop_caches(model: ir.Model, layers: tuple[int, ...]) -> None:
    """Take the caches of layers without attention off the graph; number the others anew."""
    graph = model.graph
    for value in [v for v in graph.outputs if _cache_of(v) in layers]:
        graph.outputs.remove(value)
    RemoveUnusedNodesPass()(model)
    kept = [v for v in graph.inputs if _cache_of(v) is not None and _cache_of(v) not in layers]
    for value in [v for v in graph.inputs if _cache_of(v) in layers]:
        if all(node.op_type == "Shape" for node, _ in value.uses()):
            value.replace_all_uses_with(kept[0])  # how long the past is: any layer's tells
        if value.uses():
            reader = next(iter(value.uses())).node
            raise VerificationError(
                f"the builder's {reader.op_type} {reader.name} reads {value.name} of a layer "
                f"without attention. {ANOTHER}"
            )
        graph.inputs.remove(value)
    layers_left = sorted({layer for v in kept if (layer := _cache_of(v)) is not None})
    numbers = {layer: index for index, layer in enumerate(layers_left)}
    for value in (*graph.inputs, *graph.outputs):
        found = CACHE.search(str(value.name))
        if found is not None:
            value.name = f"{found[1]}.{numbers[int(found[2])]}.{found[3]}"


def _cache_of(value: ir.Value) -> int | None:
    """The layer whose keys or values these are."""
    found = CACHE.search(str(value.name))
    return int(found[2]) if found else None


def _check(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Raise VerificationError if the graph has not as many sub-blocks as the checkpoint."""
    for part, removed in checkpoint.removed.items():
        wanted = set(range(checkpoint.n_layers)) - set(removed)
        every = tuple(range(checkpoint.n_layers))
        found = {layer_of(node) for node in model.graph if _writes(node, part, every)}
        if found != wanted:
            raise VerificationError(
                f"the built graph has the {part} of layers {sorted(map(str, found))}, "
                f"the checkpoint of {sorted(map(str, wanted))}. {ANOTHER}"
            )
