"""The two tables of a decoder, embedding and head, in one form whatever the builder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shortstack.checkpoint import Checkpoint
from shortstack.errors import VerificationError


@dataclass(frozen=True)
class Tables:
    """The node that gathers the embedding (vocab, d), and the product with the head.

    Tied: the head's weight is a Transpose of the embedding; else an initializer (d, vocab).
    """

    gather: ir.Node
    head: ir.Node
    tied: bool


def find_tables(model: ir.Model, checkpoint: Checkpoint) -> Tables:
    """Find the tables; where they are tied, let one tensor serve both.

    Builders write a tied model's table twice, or transposed for the gather.
    Raises VerificationError for a graph without them.
    """
    vocab = checkpoint.dims["vocab"]
    gather = next((n for n in model.graph if _gathers_tokens(n)), None)
    head = next((n for n in reversed(model.graph) if _multiplies(n, vocab)), None)
    if gather is None or head is None:
        raise VerificationError(
            "the built graph has no embedding or no head of a known form. "
            "Try another builder: --option builder=mobius"
        )
    if checkpoint.tied:
        _share(model, gather, head)
    return Tables(gather, head, checkpoint.tied)


def _gathers_tokens(node: ir.Node) -> bool:
    indices = node.inputs[1] if node.op_type == "Gather" else None
    return indices is not None and indices.name == "input_ids"


def _multiplies(node: ir.Node, vocab: int) -> bool:
    """Whether a product yields as many columns as there are tokens."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return False
    source = weight.producer()
    return weight.shape[1] == vocab and (
        weight.is_initializer() or (source is not None and source.op_type == "Transpose")
    )


def _share(model: ir.Model, gather: ir.Node, head: ir.Node) -> None:
    graph, table, weight = model.graph, gather.inputs[0], head.inputs[1]
    assert table is not None
    assert weight is not None
    if not table.is_initializer():
        table = _transposed(graph, weight)
        gather.replace_input_with(0, table)
    if weight.is_initializer():
        turned = ir.node(
            "Transpose",
            [table],
            {"perm": [1, 0]},
            name="lm_head/Transpose",
            outputs=[ir.val("lm_head.weight.transposed", weight.dtype, weight.shape)],
        )
        graph.insert_before(head, turned)
        head.replace_input_with(1, turned.outputs[0])
    RemoveUnusedNodesPass()(model)


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """A table (vocab, d) made of a head (d, vocab) when it is written."""
    stored, name = weight.const_value, "model.embed_tokens.weight"
    assert stored is not None

    def turn() -> ir.TensorProtocol:
        rows: NDArray[Any] = np.ascontiguousarray(stored.numpy().T)
        return ir.tensor(rows, name=name)

    shape = ir.Shape(stored.shape.numpy()[::-1])
    value = ir.val(
        name, const_value=ir.LazyTensor(turn, dtype=stored.dtype, shape=shape, name=name)
    )
    value.dtype, value.shape = stored.dtype, shape
    graph.register_initializer(value)
    return value
