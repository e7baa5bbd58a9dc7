"""A decoder's config as the `ARCH.*` keys of GGUF; what llama.cpp cannot run is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export.gguf_arch import Target
from shortstack.families import check_rope, context_tokens, rope_parameters
from shortstack.families.fields import SLIDING

SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Extra:
    """What one architecture has beyond the keys that all share.

    `keys`: method of GGUFWriter -> config field; a field that is null or absent is not written.
    `forbidden`: config fields that its graph cannot honour if they are set.
    """

    keys: tuple[tuple[str, str], ...] = ()
    forbidden: tuple[str, ...] = ()
    activations: tuple[str, ...] = SILU
    biases: tuple[str, ...] = ()
    """Projections that may have a bias, by GGUF name."""
    square_heads: bool = False
    """Heads share out the hidden size: the head size is not read."""
    head: str = ""
    """`tied` or `untied` where the head must be so."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")


QKV = ("attn_q", "attn_k", "attn_v")
EVERY = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SCALES = (
    ("add_attention_scale", "attention_multiplier"),
    ("add_embedding_scale", "embedding_multiplier"),
    ("add_residual_scale", "residual_multiplier"),
    ("add_logit_scale", "logits_scaling"),
)
SOFT_CAPS = (
    ("add_attn_logit_softcapping", "attn_logit_softcapping"),
    ("add_final_logit_softcapping", "final_logit_softcapping"),
)
PLAIN_ROPE = ("default", "linear")

EXTRAS: dict[str, Extra] = {
    "llama": Extra(biases=EVERY),
    "deci": Extra(biases=EVERY),
    "smollm3": Extra(biases=QKV, rope_types=PLAIN_ROPE),
    "qwen2": Extra(biases=QKV, square_heads=True, rope_types=PLAIN_ROPE),
    "qwen3": Extra(biases=QKV, rope_types=PLAIN_ROPE),
    "gemma": Extra(activations=GELU, head="tied", rope_types=PLAIN_ROPE),
    "gemma2": Extra(SOFT_CAPS, activations=GELU, head="tied", rope_types=PLAIN_ROPE),
    "gemma3": Extra(
        (("add_final_logit_softcapping", "final_logit_softcapping"),),
        forbidden=("attn_logit_softcapping", "use_bidirectional_attention"),
        activations=GELU,
        rope_types=PLAIN_ROPE,
    ),
    "phi3": Extra(square_heads=True, rope_types=("default", "longrope")),
    "olmo2": Extra(square_heads=True, head="untied", rope_types=("default",)),
    "granite": Extra(SCALES, biases=EVERY, square_heads=True),
}
"""GGUF architecture -> what it can express, read from its file in llama.cpp's src/models."""


def check_config(checkpoint: Checkpoint) -> None:
    """Raise ShortstackError for what llama.cpp's architecture of this model cannot express."""
    target = Target.of(checkpoint)
    target.check(checkpoint)
    extra, config, name = EXTRAS[target.arch.name], checkpoint.text, target.arch.name
    check_rope(config, extra.rope_types)
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if activation not in (*extra.activations, *(("gelu",) if extra.activations is GELU else ())):
        raise _inexpressible(checkpoint, name, f"hidden_act is {activation!r}")
    for field in extra.forbidden:
        if config.get(field):
            raise _inexpressible(checkpoint, name, f"{field} is {config[field]!r}")
    for rule in checkpoint.family.layer:
        part, _, kind = rule.gguf.rpartition(".")
        held = checkpoint.family.layer_name(0, rule) in checkpoint.tensors
        if kind == "bias" and held and part not in extra.biases:
            raise _inexpressible(checkpoint, name, f"{rule.hf} exists")
    sizes = checkpoint.dims
    if extra.square_heads and sizes["q"] != sizes["d"]:
        raise _inexpressible(
            checkpoint, name, f"heads take {sizes['q']} of a hidden size of {sizes['d']}"
        )
    if extra.head == ("untied" if checkpoint.tied else "tied"):
        raise _inexpressible(checkpoint, name, f"the head is not {extra.head}")


def _inexpressible(checkpoint: Checkpoint, arch: str, fact: str) -> ShortstackError:
    return ShortstackError(
        f"{checkpoint.path}: {fact}; llama.cpp's architecture {arch!r} cannot express that. "
        "Export to onnx instead."
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


def rope_tensors(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """Tables of frequency divisors that llama.cpp reads as tensors, by GGUF name."""
    rope = rope_parameters(checkpoint.text)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": rope_factors(rope, checkpoint.dims["head_dim"])}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def rotated_dims(checkpoint: Checkpoint) -> int:
    """How many dimensions of a head are rotated: all, or Phi-4-mini's three quarters."""
    part = float(rope_parameters(checkpoint.text).get("partial_rotary_factor") or 1.0)
    return int(checkpoint.dims["head_dim"] * part)


def add_metadata(writer: Any, checkpoint: Checkpoint, name: str, file_type: int) -> None:
    """Write the `general.*` and `ARCH.*` keys to a GGUFWriter."""
    config, sizes, target = checkpoint.text, checkpoint.dims, Target.of(checkpoint)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(sizes["vocab"])
    context = context_tokens(checkpoint.config, windowed=target.has_windows)
    writer.add_context_length(context or 2048)
    writer.add_embedding_length(sizes["d"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(target.per_layer(checkpoint, "ff"))
    writer.add_head_count(target.per_layer(checkpoint, "heads"))
    writer.add_head_count_kv(target.per_layer(checkpoint, "kv_heads"))
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    _add_rope(writer, checkpoint)
    _add_windows(writer, checkpoint, target)
    for method, field in EXTRAS[target.arch.name].keys:
        if config.get(field) is not None:
            getattr(writer, method)(float(config[field]))


def _add_rope(writer: Any, checkpoint: Checkpoint) -> None:
    import gguf

    config = checkpoint.text
    rope = rope_parameters(config)
    writer.add_rope_dimension_count(rotated_dims(checkpoint))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "longrope":
        original, stretch = _long_rope(config, rope)
        writer.add_rope_scaling_orig_ctx_len(original)
        # sqrt(1 + ln s / ln L): LongRoPE (arXiv:2402.13753), equation 7 of its section 3.3
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or factor))


def _long_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[int, float]:
    """The context before stretching, and by how much it is stretched."""
    original = rope.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    original = int(original or config["max_position_embeddings"])
    return original, float(rope.get("factor") or config["max_position_embeddings"] / original)


def _add_windows(writer: Any, checkpoint: Checkpoint, target: Target) -> None:
    if not target.has_windows or not target.writes_window:
        return
    writer.add_sliding_window(target.window)
    if target.needs_pattern:
        writer.add_sliding_window_pattern([size is not None for size in target.windows])
    local = rope_parameters(checkpoint.text, SLIDING)["rope_theta"]
    if local != rope_parameters(checkpoint.text)["rope_theta"]:
        key = f"{target.arch.name}.rope.freq_base_swa"
        writer.add_float32(key, float(local))
