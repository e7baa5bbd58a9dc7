"""Turn a float32 graph into a float16 one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def to_half(graph: ir.Graph) -> None:
    """Retype every value, cast and constant; initializers are converted when they are written."""
    for node in graph:
        for output in node.outputs:
            _retype(output)
        _constants(node)
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == SINGLE:
            node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    for value in (*graph.inputs, *graph.initializers.values()):
        _retype(value)


def _retype(value: ir.Value) -> None:
    if value.dtype == SINGLE:
        value.type = ir.TensorType(HALF)


def _constants(node: ir.Node) -> None:
    """Constants hold floats as tensors or as plain attributes, which are always float32."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == SINGLE:
            array = attribute.as_tensor().numpy().astype(np.float16)
        elif name in ("value_float", "value_floats") and node.op_type == "Constant":
            array = np.array(attribute.value, np.float16)
            del node.attributes[name]
            name = "value"
        else:
            continue
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
