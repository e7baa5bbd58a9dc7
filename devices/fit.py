"""Whether a model fits before it is loaded, and what its KV cache takes. Headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.artifact import Artifact
from shortstack.devices import vram
from shortstack.devices.workload import Workload
from shortstack.errors import ShortstackError
from shortstack.exits import config_at
from shortstack.families import decoder_config, dims, family_of, layer_windows
from shortstack.gguf_header import read_header
from shortstack.intake.packed_file import read_config
from shortstack.packed.read import open_packed

KV_TYPE_BYTES: Mapping[str, float] = {
    **{"float32": 4, "float16": 2, "bfloat16": 2, "F32": 4, "F16": 2, "BF16": 2},
    **{"Q8_0": 34 / 32, "Q5_1": 24 / 32, "Q5_0": 22 / 32, "Q4_1": 20 / 32, "Q4_0": 18 / 32},
}
"""Bytes a value, by the name that a session gives its cache's type; blocks of ggml hold 32."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

QUANTIZED_BYTES: Mapping[str, float] = {
    "bnb-int8": 1.0,
    "bnb-nf4": 0.5 + 4 / 64,
    "torchao-int4": 0.5 + 4 / 128,
    "awq-int4": 0.5 + 2.5 / 128,
}
"""Bytes a weight of pytorch's `quantize`, scales included: a float32 for each 64 weights of NF4,
scale and zero in bfloat16 for each 128 of torchao's, a float16 and 4 bits of AWQ's; int8 has one
scale a row."""


def kv_values_per_token(path: Path, fmt: str) -> int | None:
    """Numbers that the KV cache keeps of one token: over layers, heads x (key + value width).

    None where the model does not say. A sliding window keeps fewer tokens, not fewer a token.
    """
    try:
        if fmt == "gguf":
            return _of_gguf(path)
        if fmt == "checkpoint":
            return _of_checkpoint(path)
        if fmt == "packed":
            return _of_config(read_config(open_packed(path)))
        return _of_genai(path)
    except (ShortstackError, OSError, ValueError, KeyError, TypeError):
        return None


def kv_bytes_per_token(path: Path, fmt: str, cache_type: str | None) -> int | None:
    """Bytes of one token of one sequence in a cache of `cache_type`, as a session's info has it."""
    width = KV_TYPE_BYTES.get(cache_type or "")
    values = kv_values_per_token(path, fmt)
    return None if width is None or values is None else round(width * values)


def refusal(
    artifact: Artifact,
    workload: Workload,
    device: str,
    info: Mapping[str, Any],
    options: Mapping[str, str],
) -> str | None:
    """Why the model cannot fit: what it needs at the least, what there is. None if it may fit.

    At the least: the weights and the KV cache. What a runtime takes besides is not counted, so
    only what surely fails is refused. A model of which some layers stay in RAM may always fit; of
    one with sliding windows, which keep the last tokens alone, only the weights count.
    """
    if _is_split(artifact, device, options):
        return None
    have = available_bytes(device, info)
    weights = weight_bytes(artifact.to_dict())
    values = kv_values_per_token(artifact.path, artifact.format) or 0
    values = 0 if _has_windows(artifact.path, artifact.format) else values
    kind = options.get("kv_type", "").upper() or options.get("dtype") or "F16"
    tokens = workload.context_tokens * workload.batch
    cache = round(values * KV_TYPE_BYTES[kind] * tokens)
    if have is None or weights + cache <= have:
        return None
    return (
        f"{artifact.path.name} does not fit: it needs at least {_gb(weights + cache)} (weights "
        f"{_gb(weights)}, KV cache {_gb(cache)} for {tokens:,} tokens), {device} has {_gb(have)}. "
        "Take a smaller export, fewer tokens or another device."
    )


def available_bytes(device: str, info: Mapping[str, Any]) -> int | None:
    """Memory that a model could take now; None where it is not known."""
    free = vram.free_bytes(device)
    return info.get("vram_bytes") if free is None else free


def _is_split(artifact: Artifact, device: str, options: Mapping[str, str]) -> bool:
    """Whether some layers stay in RAM; llama.cpp counts the output as one more layer."""
    asked = options.get("gpu_layers", "all")
    return device != "cpu" and asked.isdigit() and int(asked) <= artifact.n_layers


def _has_windows(path: Path, fmt: str) -> bool:
    """Whether some layers see the last tokens alone, as far as the model says."""
    try:
        if fmt == "gguf":
            header = read_header(path)
            arch = header.text("general.architecture")
            return bool(header.integer(f"{arch}.attention.sliding_window"))
        if fmt in ("checkpoint", "packed"):
            config = read_config(open_packed(path)) if fmt == "packed" else config_at(path)
            return any(layer_windows(family_of(config), decoder_config(config)))
        config = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        return bool(config["model"]["decoder"].get("sliding_window"))
    except (ShortstackError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def weight_bytes(artifact: Mapping[str, Any]) -> int:
    """Bytes that an artifact's weights, as a record has it, take once loaded: those of the file,
    but a checkpoint is converted to the type that it runs in, which its precision names."""
    spec = artifact["spec"]
    width = DTYPE_BYTES.get(spec["precision"]) if spec["format"] == "checkpoint" else None
    return int(artifact["size_bytes"] if width is None else artifact["n_params"] * width)


def _of_gguf(path: Path) -> int | None:
    header = read_header(path)
    arch = header.text("general.architecture")
    layers = header.integer(f"{arch}.block_count")
    heads = _row(header.value(f"{arch}.attention.head_count"), layers)
    kv_heads = _row(header.value(f"{arch}.attention.head_count_kv"), layers) or heads
    if not heads:
        return None
    width = header.integer(f"{arch}.embedding_length") // max(heads)
    key = header.integer(f"{arch}.attention.key_length", width)
    value = header.integer(f"{arch}.attention.value_length", width)
    return sum(kv_heads) * (key + value)


def _row(value: Any, layers: int) -> list[int]:
    """One number a layer, from a key that may hold one for all."""
    return value if isinstance(value, list) else [value or 0] * layers


def _of_checkpoint(path: Path) -> int:
    return _of_config(config_at(path))


def _of_config(config: dict[str, Any]) -> int:
    sizes = dims(decoder_config(config))
    return 2 * sizes["layers"] * sizes["kv"]


def _of_genai(path: Path) -> int:
    config = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    heads = decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
    return int(2 * heads * decoder["head_size"])


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
