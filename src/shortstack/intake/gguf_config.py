"""config.json from the metadata of a GGUF file, refusing every key whose effect we do not know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_BANDS = (1.0, 4.0)
"""low_freq_factor and high_freq_factor of every Llama 3.x release."""

Shapes = Mapping[str, tuple[int, ...]]

ARCH_KEYS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
"""Keys of the architecture that this module reads. Any other one could change the numbers."""


class _Keys:
    """The keys of one architecture, read as numbers. A missing or varying one is an error."""

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        self._file, self._fields = file, fields
        self._arch = str(fields["general.architecture"])

    def number(self, name: str, default: float | None = None) -> float:
        value = self._fields.get(f"{self._arch}.{name}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ShortstackError(
                    f"{self._file}: {self._arch}.{name} varies between layers ({value[:4]} …); "
                    "only models whose layers are all alike are supported. Choose another model."
                )
            value = value[0]
        if not isinstance(value, (int, float)):
            raise ShortstackError(
                f"{self._file} has no number {self._arch}.{name}. Download the file again."
            )
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        return int(self.number(name, default))

    def text(self, name: str) -> str | None:
        value = self._fields.get(f"{self._arch}.{name}")
        return None if value is None else str(value)


def rebuild_config(
    file: Path, fields: Mapping[str, Any], shapes: Shapes, rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """Rebuild config.json. GGUF cannot tell Llama from Mistral: the graph is the same.

    Raises ShortstackError for an unknown key, split files, experts, partial or odd rotation.
    """
    _check_known(file, fields)
    keys = _Keys(file, fields)
    d, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", d // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(name, head_dim) != head_dim:
            raise ShortstackError(
                f"{file}: {name} is {keys.whole(name)}, the head size is {head_dim}; "
                "that needs another graph than Llama's. Choose another model."
            )
    if "token_embd.weight" not in shapes:
        raise ShortstackError(f"{file} has no tensor token_embd.weight. Download the file again.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": d,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": _shortest(keys.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(keys.number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file, keys, head_dim, rope_factors),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": _has_bias(file, shapes, ("attn_q", "attn_k", "attn_v", "attn_output")),
        "mlp_bias": _has_bias(file, shapes, ("ffn_gate", "ffn_up", "ffn_down")),
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _check_known(file: Path, fields: Mapping[str, Any]) -> None:
    if int(fields.get("split.count") or 0) > 1:
        raise ShortstackError(
            f"{file} is one of {fields['split.count']} split files. "
            "Join them first: llama-gguf-split --merge"
        )
    arch = str(fields["general.architecture"])
    for name, value in fields.items():
        key = name.removeprefix(f"{arch}.")
        if key == name or key in ARCH_KEYS or not value:
            continue  # a zero (expert_count = 0) or an empty value switches its feature off
        if key.startswith("expert"):
            raise ShortstackError(
                f"{file} is a mixture-of-experts model ({name} = {value}); "
                "shortstack cuts dense transformers only. Choose a dense model."
            )
        raise ShortstackError(
            f"{file}: metadata key {name} is unknown and could change what the model computes. "
            "Start from the original folder."
        )


def _rope_scaling(
    file: Path, keys: _Keys, head_dim: int, factors: Sequence[float] | None
) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type") or "none"
    if factors is not None and max(factors) > 1:
        if kind not in ("none", "llama3"):
            raise ShortstackError(
                f"{file} has both {ROPE_FACTORS} and rope scaling {kind!r}. "
                "Start from the original folder."
            )
        return _llama3_scaling(file, keys, head_dim, factors)
    factor = keys.number("rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest(factor)}
    raise ShortstackError(
        f"{file}: rope scaling {kind!r} is not supported from GGUF. Start from the original folder."
    )


def _llama3_scaling(
    file: Path, keys: _Keys, head_dim: int, factors: Sequence[float]
) -> dict[str, Any]:
    """Find the Llama 3 parameters that give exactly these factors, or refuse.

    GGUF keeps only the divisors of the frequencies; the config keeps what they were made from.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    for context in (2**power for power in range(10, 20)):
        made = llama3_factors(theta, head_dim, max(factors), context)
        if len(made) == len(factors) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(made, factors, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "factor": _shortest(max(factors)),
                "low_freq_factor": LLAMA3_BANDS[0],
                "high_freq_factor": LLAMA3_BANDS[1],
                "original_max_position_embeddings": context,
            }
    raise ShortstackError(
        f"{file}: the values of {ROPE_FACTORS} are not Llama 3's. Start from the original folder."
    )


def llama3_factors(theta: float, head_dim: int, factor: float, context: int) -> list[float]:
    """Divisor of each rotary frequency in Llama 3.1's scaling (arXiv:2407.21783, section 3.4.1).

    Wavelengths above context/low are stretched by `factor`, below context/high left alone,
    blended in between.
    """
    low, high = LLAMA3_BANDS
    divisors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (pair / head_dim)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _has_bias(file: Path, shapes: Shapes, parts: Sequence[str]) -> bool:
    found = [part for part in parts if f"blk.0.{part}.bias" in shapes]
    if found and len(found) != len(parts):
        raise ShortstackError(
            f"{file}: {found[0]} has a bias but not every one of {', '.join(parts)}; "
            "a Llama config cannot say that. Choose another model."
        )
    return bool(found)


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 9.999999747e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))
