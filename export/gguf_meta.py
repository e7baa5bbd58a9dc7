"""A Llama-family config as the `llama.*` keys of GGUF; what llama.cpp cannot run is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families import check_rope, context_tokens, rope_parameters


def check_config(checkpoint: Checkpoint) -> None:
    """Raise ShortstackError for a setting that llama.cpp's llama architecture lacks."""
    config = checkpoint.text
    if checkpoint.family.gguf_arch != "llama":
        raise ShortstackError(
            f"{checkpoint.path}: model type {config.get('model_type')!r} has no GGUF export yet. "
            "Export to onnx instead."
        )
    check_rope(config)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ShortstackError(
            f"{checkpoint.path}: hidden_act is {activation!r}; llama.cpp's llama models have silu "
            "only. Export to onnx instead."
        )


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Divisors of the rotation frequencies for Llama 3's scaling, one a pair of rows.

    1 for wavelengths below original/high, `factor` for those above original/low, and between
    them the inverse of the linear blend of 1/factor and 1.
    """
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = float(rope["original_max_position_embeddings"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    wavelengths = 2 * math.pi * np.float64(rope["rope_theta"]) ** exponents
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)


def add_metadata(writer: Any, checkpoint: Checkpoint, name: str, file_type: int) -> None:
    """Write the `general.*` and `llama.*` keys to a GGUFWriter."""
    config, sizes = checkpoint.text, checkpoint.dims
    rope = rope_parameters(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(sizes["vocab"])
    writer.add_context_length(context_tokens(checkpoint.config) or 2048)
    writer.add_embedding_length(sizes["d"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["ff"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
