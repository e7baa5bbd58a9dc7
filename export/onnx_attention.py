"""Per-layer attention in a built graph: windows and rotation tables as the checkpoint has them.

Builders decide by layer index, or once for all layers, which layers have a window and which
rotation: after a cut, or in a family with two rotations, the graph is another model. Here each
GroupQueryAttention gets what its own layer has.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.errors import VerificationError
from shortstack.export.onnx_graph import CACHE
from shortstack.families import layer_windows, rotates
from shortstack.families.fields import FULL, SLIDING, rope_parameters, spell_out
from shortstack.pretrained import config_of

GROUP_QUERY = "GroupQueryAttention"
COS, SIN = 7, 8
"""Inputs of GroupQueryAttention (onnxruntime, ContribOperators.md)."""
IGNORED = ("rotary_embedding_dim", "sliding_window_cache")
"""Attributes of builders: the first is told by the tables' width and no attribute of the operator;
the second makes a cache as short as the window, which other layers' caches are not."""

Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


def attentions(model: ir.Model) -> Iterator[tuple[int, ir.Node]]:
    """(layer, node) of each fused attention, the layer read off the cache that it reads."""
    for node in model.graph:
        if node.op_type == GROUP_QUERY:
            past = node.inputs[3]
            found = CACHE.search(str(past.name)) if past is not None else None
            if found is None:
                raise VerificationError(
                    f"the builder's {node.name} reads no cache of a known name. "
                    "Try another builder: --option builder=mobius"
                )
            yield int(found[2]), node


def set_attention(model: ir.Model, checkpoint: Checkpoint, context: int) -> None:
    """Give every fused attention its layer's window and rotation table."""
    family, text = checkpoint.family, checkpoint.text
    windows, turning = layer_windows(family, text), rotates(family, text)
    kinds = spell_out(family, text).get("layer_types") or [FULL] * len(windows)
    shared: dict[str, tuple[ir.Value, ir.Value]] = {}
    for layer, node in attentions(model):
        node.attributes["local_window_size"] = ir.AttrInt64(
            "local_window_size", windows[layer] or -1
        )
        for name in IGNORED:
            node.attributes.pop(name, None)
        if bool(node.attributes.get_int("do_rotary", 0)) != turning[layer]:
            raise VerificationError(
                f"the builder's graph rotates layer {layer} wrongly. "
                "Try another builder: --option builder=mobius"
            )
        if not turning[layer]:
            continue
        kind = kinds[layer] if _kinds_differ(checkpoint) else FULL
        if kind not in shared:
            shared[kind] = _register(model, kind, rotation_tables(checkpoint, kind, context))
        for place, value in zip((COS, SIN), shared[kind], strict=True):
            node.replace_input_with(place, value)


def _kinds_differ(checkpoint: Checkpoint) -> bool:
    text = checkpoint.text
    return rope_parameters(text, FULL) != rope_parameters(text, SLIDING)


def _register(model: ir.Model, kind: str, tables: Tables) -> tuple[ir.Value, ir.Value]:
    made = []
    for name, table in zip(("cos", "sin"), tables, strict=True):
        label = f"rotary.{kind}.{name}"
        value = ir.val(label, const_value=ir.tensor(table, name=label))
        model.graph.register_initializer(value)
        made.append(value)
    return made[0], made[1]


def rotation_tables(checkpoint: Checkpoint, kind: str, context: int) -> Tables:
    """Cosines and sines (context, rotated / 2) of the layers of a kind, by transformers itself.

    Its own class knows every scaling (llama3, YaRN, longrope …) and its factor on the result.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(checkpoint.path).get_text_config()
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config).get_decoder()
    rotary: Any = type(decoder.rotary_emb)(config)
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    told = {"layer_type": kind} if by_kind else {}
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(context)[None], **told)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()
