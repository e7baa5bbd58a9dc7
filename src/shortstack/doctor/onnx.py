"""A decoder of a few ONNX nodes whose logits can be told beforehand, for the doctor.

It adds to each token's one-hot row the mean of all rows in its cache, and doubles the sum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENS = 16
"""Vocabulary and width at once."""

CONTEXT = 32


def decoder_inputs(tokens: Sequence[int]) -> dict[str, Any]:
    """Feeds for a first prompt: int64 (1, tokens), an empty cache (1, 1, 0, TOKENS)."""
    import numpy as np

    empty = np.zeros((1, 1, 0, TOKENS), np.float32)
    return {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
    }


def decoder_answer(tokens: Sequence[int]) -> Any:
    """The logits after the last token: array (TOKENS,)."""
    import numpy as np

    rows = np.eye(TOKENS, dtype=np.float32)[list(tokens)]
    return 2 * (rows[-1] + rows.mean(axis=0))


def write_tiny_onnx(folder: Path) -> Path:
    """Write model.onnx and genai_config.json; returns the path of the model."""
    import onnx

    path = folder / "model.onnx"
    onnx.save(_model(), str(path))
    (folder / "genai_config.json").write_text(json.dumps(_config()), encoding="utf-8")
    return path


def _model() -> Any:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    float32, int64 = TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        value("input_ids", int64, "batch", "new"),
        value("attention_mask", int64, "batch", "all"),
        *(
            value(f"past_key_values.0.{part}", float32, "batch", 1, "past", TOKENS)
            for part in ("key", "value")
        ),
    ]
    outputs = [
        value("logits", float32, "batch", "new", TOKENS),
        *(
            value(f"present.0.{part}", float32, "batch", 1, "all", TOKENS)
            for part in ("key", "value")
        ),
    ]
    eye = np.eye(TOKENS, dtype=np.float32)
    weights = [
        numpy_helper.from_array(eye, "embedding"),
        numpy_helper.from_array(2 * eye, "head"),
        numpy_helper.from_array(np.array([1], np.int64), "heads"),
        numpy_helper.from_array(np.array([2], np.int64), "positions"),
    ]
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
        helper.make_node("Unsqueeze", ["hidden", "heads"], ["rows"]),
        *(
            helper.make_node(
                "Concat", [f"past_key_values.0.{part}", "rows"], [f"present.0.{part}"], axis=2
            )
            for part in ("key", "value")
        ),
        helper.make_node("ReduceMean", ["present.0.value", "positions"], ["means"], keepdims=0),
        helper.make_node("Add", ["hidden", "means"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "head"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _config() -> dict[str, Any]:
    caches = {
        f"{kind}_{part}_names": f"{name}.%d.{part}"
        for kind, name in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": 0,
            "eos_token_id": [0],
            "pad_token_id": 0,
            "context_length": CONTEXT,
            "vocab_size": TOKENS,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "hidden_size": TOKENS,
                "head_size": TOKENS,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "num_hidden_layers": 1,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **{key: name for key, name in caches.items() if key.startswith("past")},
                },
                "outputs": {
                    "logits": "logits",
                    **{key: name for key, name in caches.items() if key.startswith("present")},
                },
            },
        },
        "search": {"do_sample": False, "max_length": CONTEXT, "past_present_share_buffer": False},
    }
