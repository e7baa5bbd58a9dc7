"""Whether a graph's products find the importance of what they read, told by their numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.export.importance import HEAD
from shortstack.export.onnx_quantize import Importance
from shortstack.export.onnx_tables import find_tables
from shortstack.export.weights import Weights


def projections(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(layers.N.module, its matrix) of every projection."""
    weights = Weights(checkpoint)
    for layer in range(checkpoint.n_layers):
        for rule in checkpoint.family.layer:
            if rule.hf.endswith("_proj.weight"):
                name = checkpoint.family.layer_name(layer, rule)
                module = f"layers.{layer}.{rule.hf.removesuffix('.weight')}"
                yield module, np.array(weights.stored(name), np.float32)


def mismatches(checkpoint: Checkpoint, model: ir.Model) -> tuple[int, list[str]]:
    """How many matrices are held against importance, and those that got another's or none.

    A matrix is known by its first row: what builders fuse reads the same.
    """
    tables = dict(projections(checkpoint))
    number = {name: index + 1 for index, name in enumerate(tables)}
    channels = {
        name: np.full(table.shape[1], number[name], np.float32) for name, table in tables.items()
    }
    channels[HEAD] = np.zeros(checkpoint.dims["d"], np.float32)
    importance, head = Importance(channels), find_tables(model, checkpoint).head
    count, wrong = 0, []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or node is head:
            continue
        stored = weight.const_value.numpy()
        if stored.ndim != 2:
            continue
        count += 1
        meant = [n for n, table in tables.items() if _has_row(table, stored[:, 0])]
        found = importance.of(node)
        same = _same_input(meant[0], number) if meant else set()
        if found is None or found[0] not in same or len(found) != stored.shape[0]:
            wrong.append(str(node.name))
    return count, wrong


def _has_row(table: NDArray[np.float32], row: NDArray[np.float32]) -> bool:
    return table.shape[1] == len(row) and bool((table == row).all(-1).any())


def _same_input(name: str, number: dict[str, int]) -> set[int]:
    layer, _, module = name.rpartition(".")
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if module in group:
            return {number[f"{layer}.{other}"] for other in group}
    return {number[name]}
