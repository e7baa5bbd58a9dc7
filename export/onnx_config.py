"""genai_config.json: with it onnxruntime-genai opens the folder of an ONNX export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from shortstack.checkpoint import Checkpoint
from shortstack.export.onnx_attention import GROUP_QUERY
from shortstack.export.onnx_graph import CACHE

FILE = "genai_config.json"
DEFAULT_CONTEXT = 2048


def genai_config(model: ir.Model, checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """What onnxruntime-genai must know of a graph: sizes, names, tokens; greedy by default."""
    graph, sizes = model.graph, checkpoint.dims
    inputs = [str(value.name) for value in graph.inputs]
    caches = {int(found[2]) for name in inputs if (found := CACHE.search(name))}
    ends = _tokens(checkpoint, "eos_token_id")
    starts, pads = _tokens(checkpoint, "bos_token_id"), _tokens(checkpoint, "pad_token_id")
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": (starts or ends or [0])[0],
            "eos_token_id": ends or [0],
            "pad_token_id": (pads or ends or [0])[0],
            "context_length": context,
            "vocab_size": sizes["vocab"],
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": sizes["d"],
                "head_size": sizes["head_dim"],
                "num_attention_heads": sizes["heads"],
                "num_key_value_heads": sizes["kv_heads"],
                "num_hidden_layers": len(caches),
                "inputs": {
                    **{name: name for name in inputs if CACHE.search(name) is None},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "past_present_share_buffer": any(node.op_type == GROUP_QUERY for node in graph),
        },
    }


def _tokens(checkpoint: Checkpoint, field: str) -> list[int]:
    """Token numbers of a field, as generation_config.json overrides config.json."""
    file = checkpoint.path / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for level in (generation, checkpoint.text, checkpoint.config):
        found = level.get(field)
        if found is not None:
            return [int(token) for token in (found if isinstance(found, list) else [found])]
    return []


def write_genai_config(config: dict[str, Any], folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
