"""Fewer, larger operators in a quantized graph: each costs a start of all threads a token."""

from __future__ import annotations

import re

import onnx_ir as ir

from shortstack.export.onnx_graph import names_of

GATE, UP = re.compile(r"\bgate_proj\b"), re.compile(r"\bup_proj\b")


def beside(node: ir.Node) -> ir.Node | None:
    """The up projection that reads what this gate projection reads, if it is one."""
    hidden = node.inputs[0]
    if hidden is None or not _named(node, GATE):
        return None
    others = [other for other, place in hidden.uses() if place == 0 and _named(other, UP)]
    return others[0] if len(others) == 1 and others[0].op_type == node.op_type else None


def _named(node: ir.Node, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(name) for name in names_of(node))


def fuse_silu(graph: ir.Graph) -> None:
    """x · sigmoid(x) as one operator: QuickGelu is x · sigmoid(alpha · x), here with alpha 1.

    onnxruntime 1.31 does not find this by itself on the CPU.
    """
    for node in list(graph):
        if node.op_type != "Sigmoid":
            continue
        uses = list(node.outputs[0].uses())
        product = uses[0][0] if len(uses) == 1 and uses[0][0].op_type == "Mul" else None
        if product is None or set(product.inputs) != {node.inputs[0], node.outputs[0]}:
            continue
        silu = ir.node(
            "QuickGelu",
            [node.inputs[0]],
            {"alpha": 1.0},
            domain="com.microsoft",
            name=f"{node.name}/silu",
        )
        replace(graph, product, [silu])
        graph.remove(node, safe=True)


def replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last of them makes its result, under its name."""
    after = new[-1].outputs[0]
    graph.insert_before(old, new)
    take_over(graph, old, after)


def take_over(graph: ir.Graph, old: ir.Node, after: ir.Value) -> None:
    """Let a value stand for the only result of a node, under its name, and remove the node."""
    before = old.outputs[0]
    after.type, after.shape, name = before.type, before.shape, before.name
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name
