"""Leave removed sub-blocks out of a built graph: nodes, weights and caches."""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shortstack.checkpoint import Checkpoint
from shortstack.errors import VerificationError
from shortstack.export.onnx_graph import CACHE, layer_of, names_of
from shortstack.families.table import Part

OUTPUTS: dict[Part, re.Pattern[str]] = {
    "attention": re.compile(r"\bo_proj\b"),
    "mlp": re.compile(r"\bdown_proj\b"),
}
"""How builders name the product whose result a sub-block adds to the residual stream."""

STAYS_ZERO = {"Mul", "Div", "Reshape", "Cast", "RMSNormalization", "SimplifiedLayerNormalization"}
"""Operators whose result is zero where their first input is (a norm of zeros is 0 / epsilon)."""

SKIP_NORM = "SkipSimplifiedLayerNormalization"
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
    """Replace a sum with zeros by its other term; let zeros through what keeps them zero."""
    first, second = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    other = second if first in zero else first
    if node.op_type == "Add" and other is not None and other not in zero:
        if other.const_value is not None:  # a bias: check_removed has seen that it is zero
            zero.add(node.outputs[0])
        else:
            node.outputs[0].replace_all_uses_with(other, replace_graph_outputs=True)
    elif node.op_type == SKIP_NORM and other is not None and other not in zero:
        _unskip(graph, node, other)
    elif node.op_type == "Mul" or (node.op_type in STAYS_ZERO and first in zero):
        zero.add(node.outputs[0])
    else:
        raise VerificationError(
            f"the builder's {node.op_type} {node.name} reads the result of a removed sub-block, "
            f"which cannot be left out. {ANOTHER}"
        )


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
    graph, new = model.graph, dict[int, int]()
    for values in (graph.outputs, graph.inputs):
        for value in list(values):
            found = CACHE.search(str(value.name))
            if found is not None and int(found[2]) in layers:
                values.remove(value)
                if value.uses():
                    raise VerificationError(
                        f"the builder's graph reads {value.name} of a layer without attention. "
                        f"{ANOTHER}"
                    )
            elif found is not None:
                index = new.setdefault(int(found[2]), len(new))
                value.name = f"{found[1]}.{index}.{found[3]}"
        RemoveUnusedNodesPass()(model)


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
