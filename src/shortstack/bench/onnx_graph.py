"""What an ONNX graph of another tool is: its layers, its weights, how they are stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no stubs

from shortstack.errors import ShortstackError, one_line

PAST_KEY = re.compile(r"past_key_values\.\d+\.key$")
PACKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Operator -> the input that holds several weights a byte, `bits` of each."""

SHORT = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
WHOLE = ("INT8", "UINT8")


@dataclass(frozen=True)
class GraphFacts:
    """`precision`: how most weights are stored, in our words (fp32, fp16, int8, int4)."""

    n_layers: int
    n_params: int
    precision: str
    data_files: tuple[str, ...]
    """Where the weights lie that are not in the graph's own file, relative to it."""


def graph_facts(model: Path) -> GraphFacts:
    """Read the graph, not its data. Tables of scales and zero points are no parameters.

    Raises ShortstackError for a file that is no ONNX model.
    """
    try:
        graph = ir.load(model).graph
    except (DecodeError, OSError, ValueError) as error:
        raise ShortstackError(
            f"{model} is no ONNX model: {one_line(str(error), 200)}. Export it again."
        ) from None
    layers = sum(PAST_KEY.search(value.name or "") is not None for value in graph.inputs)
    sizes: Counter[str] = Counter()
    for value in graph.initializers.values():
        for precision, count in _weights(value):
            sizes[precision] += count
    kind = sizes.most_common(1)[0][0] if sizes else "fp32"
    values = [value.const_value for value in graph.initializers.values()]
    data = {str(tensor.location) for tensor in values if isinstance(tensor, ir.ExternalTensor)}
    lacking = sorted(name for name in data if not (model.parent / name).is_file())
    if lacking:
        raise ShortstackError(
            f"{model} keeps weights in {one_line(lacking[0], 100)}, which is not there. "
            "Copy the whole folder."
        )
    return GraphFacts(layers, sum(sizes.values()), kind, tuple(sorted(data)))


def _weights(value: ir.Value) -> Iterator[tuple[str, int]]:
    """(precision, number of weights) of an initializer; nothing for what is no weight."""
    tensor = value.const_value
    if tensor is None or not tensor.shape.rank():
        return
    count, kind = int(tensor.size), tensor.dtype.name
    readers = [(node.op_type, place, node) for node, place in value.uses()]
    packed = [n for op, place, n in readers if op in PACKED and place == PACKED[op]]
    if packed:
        bits = packed[0].attributes.get("bits")
        width = 4 if bits is None else bits.as_int()
        yield f"int{width}", count * 8 // width if kind in WHOLE else count
    elif any(op in PACKED for op, _, _ in readers):
        return  # scales, zero points
    elif kind in WHOLE and tensor.shape.rank() > 1:
        yield "int8", count
    elif kind in SHORT:
        yield SHORT[kind], count
