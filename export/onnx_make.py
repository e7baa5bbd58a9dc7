"""The work of an ONNX export, in a child: build the graph, set it right, write it quantized."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shortstack import child
from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.export.importance_file import read_channels
from shortstack.export.onnx_attention import set_attention
from shortstack.export.onnx_builders import choose
from shortstack.export.onnx_codes import KnownRows
from shortstack.export.onnx_config import genai_config, write_genai_config
from shortstack.export.onnx_data import DataFile
from shortstack.export.onnx_graph import bytes_per_token, forget_unused, multiplied_params
from shortstack.export.onnx_half import to_half
from shortstack.export.onnx_quantize import Importance, Quantization, half_activations, quantize
from shortstack.export.onnx_removed import drop_removed
from shortstack.export.onnx_tables import Tables, find_tables
from shortstack.export.to_onnx import DATA, MODEL, SCRATCH

BITS = {"int8": 8, "int4": 4}


def make_here(request: dict[str, Any]) -> dict[str, Any]:
    """Write model.onnx, its data and genai_config.json into the folder `out` of the request."""
    checkpoint, out = Checkpoint.open(Path(request["checkpoint"])), Path(request["out"])
    scratch = out / SCRATCH
    try:
        _, builder = choose(checkpoint, request["builder"])
        model = builder.build(checkpoint, scratch)
        set_attention(model, checkpoint, request["context"])
        drop_removed(model, checkpoint)
        tables = find_tables(model, checkpoint)
        channels = request["importance"]
        importance = Importance(read_channels(Path(channels))) if channels else None
        config = genai_config(model, checkpoint, request["context"])
        with disk_errors(out / DATA):
            precision, chosen = request["precision"], request["chosen"]
            known = KnownRows(checkpoint) if precision == "int8" else None
            write(model, tables, out, precision, chosen, importance, known)
            write_genai_config(config, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    multiplied = multiplied_params(out / MODEL)
    return {
        "matmul_params": multiplied.matmul_params,
        "head_params": multiplied.head_params,
        "weight_bytes_per_token": bytes_per_token(out / MODEL),
        "unweighted": importance.missing if importance else [],
        "kept_codes": len(known.found) if known else 0,
        "rounded": known.missing if known else [],
    }


def write(
    model: ir.Model,
    tables: Tables,
    out: Path,
    precision: str,
    chosen: dict[str, str],
    importance: Importance | None,
    known: KnownRows | None = None,
) -> None:
    """Write the model, one tensor at a time, in a precision."""
    graph = model.graph
    RemoveUnusedNodesPass()(model)
    forget_unused(graph)
    report = _Report(_weights(graph))
    with DataFile(out / DATA) as data:
        if precision in BITS:
            how = Quantization.of(BITS[precision], chosen, importance, known)
            quantize(graph, tables, how, data, report)
            RemoveUnusedNodesPass()(model)
        if precision == "fp16" or half_activations(chosen):
            to_half(graph)
        _write_rest(graph.initializers.values(), data, report)
    ir.save(model, out / MODEL)


def _write_rest(values: Iterable[ir.Value], data: DataFile, report: Callable[[int], None]) -> None:
    """Write every tensor that is not in the file yet, as the type that the graph says."""
    for value in values:
        stored = value.const_value
        if stored is None or (isinstance(stored, ir.ExternalTensor) and data.holds(stored)):
            continue
        array = stored.numpy()
        if value.dtype == ir.DataType.FLOAT16:
            array = array.astype(np.float16)
        value.const_value = data.add(str(value.name), array)
        report(stored.size)


class _Report:
    """Tells the parent how many of all weights are written."""

    def __init__(self, total: int) -> None:
        self._done, self._total = 0, total

    def __call__(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        child.report_progress(self._done, self._total)


def _weights(graph: ir.Graph) -> int:
    return sum(v.const_value.size for v in graph.initializers.values() if v.const_value is not None)
