"""Tiny random GGUF files of several architectures, written by the gguf package, any layers kept.

Weights depend on the layer's original number, so a file written with some of the layers is what a
cut of the whole file has to compute.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, MLP, HEADS, KV_HEADS, VOCAB, WINDOW = 64, 96, 4, 2, 128, 16
LAST = ("attn_output.weight", "ffn_down.weight")
NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True)
class Kind:
    """What an architecture has beyond Llama's: tensors (name -> size), keys behind its name."""

    norms: Mapping[str, int] = field(default_factory=dict)
    leaves_out: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    biases: bool = False
    window_period: int | None = None
    untied: bool = False
    head: int = 16
    """Rows of a head."""


POST_NORMS = {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}
QK_NORMS = {"attn_q_norm": 16, "attn_k_norm": 16}
WINDOWED = {"attention.sliding_window": WINDOW}
KINDS: Mapping[str, Kind] = {
    "llama": Kind(),
    "deci": Kind(),
    "qwen2": Kind(biases=True),
    "qwen3": Kind(norms=QK_NORMS),
    "gemma2": Kind(norms=POST_NORMS, keys=WINDOWED, window_period=2),
    "gemma3": Kind(
        norms={**POST_NORMS, "attn_q_norm": 64, "attn_k_norm": 64},
        keys={**WINDOWED, "rope.freq_base_swa": 1000.0},
        window_period=6,
        head=64,
    ),
    "olmo2": Kind(
        norms={**POST_NORMS, "attn_q_norm": HEADS * 16, "attn_k_norm": KV_HEADS * 16},
        leaves_out=NORMS,
        keys=WINDOWED,
        window_period=4,
        untied=True,
    ),
    "cohere2": Kind(
        leaves_out=("ffn_norm",), keys={**WINDOWED, "logit_scale": 0.1}, window_period=4
    ),
    "smollm3": Kind(),
    "glm4": Kind(),
    "mamba": Kind(),
    "minicpm": Kind(),
}


def write_file(
    path: Path,
    arch: str,
    layers: Sequence[int],
    *,
    kind: str = "F32",
    pattern: Sequence[bool] | None = None,
    without_attention: Sequence[int] = (),
    silent: Sequence[int] = (),
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """Write the layers (original numbers) of the random model of `arch`. `pattern` is written as
    one flag a layer; `keys` (full names; None leaves one out) are added to or replace what is
    there; `without_attention` makes per-layer head counts; `silent` layers add nothing."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in {**_keys(arch, layers, pattern, without_attention), **(keys or {})}.items():
        add_key(writer, name, value)
    for name, array in tensors(arch, layers, without_attention):
        if any(name.startswith(f"blk.{place}.") for place in silent) and name.endswith(LAST):
            array = np.zeros_like(array)
        stored = getattr(gguf.GGMLQuantizationType, kind if array.ndim > 1 else "F32")
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: Any, name: str, value: Any) -> None:
    adders = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32))
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        next(add for kind, add in adders if isinstance(value, kind))(name, value)


def tensors(
    arch: str, layers: Sequence[int], without_attention: Sequence[int] = ()
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name in the new file, row-major values; a layer's values belong to its original number."""
    yield "token_embd.weight", _random("token_embd", (VOCAB, HIDDEN)) * 0.3
    if KINDS[arch].untied:
        yield "output.weight", _random("output", (VOCAB, HIDDEN)) * 0.3
    yield "output_norm.weight", 1 + _random("output_norm", (HIDDEN,)) * 0.3
    for place, layer in enumerate(layers):
        for name, shape in _layer_shapes(KINDS[arch], layer not in without_attention).items():
            values = _random(f"{layer}.{name}", shape)
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
            values = values * np.float32(scale) + np.float32("norm" in name)
            yield f"blk.{place}.{name}", values.astype(np.float32)


def _layer_shapes(kind: Kind, attention: bool) -> dict[str, tuple[int, ...]]:
    wide, narrow = HEADS * kind.head, KV_HEADS * kind.head
    shapes: dict[str, tuple[int, ...]] = {}
    if attention:
        shapes = {
            f"attn_{n}.weight": (w, HIDDEN)
            for n, w in zip("qkv", (wide, narrow, narrow), strict=True)
        }
        shapes["attn_output.weight"] = (HIDDEN, wide)
        if kind.biases:
            shapes |= {
                f"attn_{n}.bias": (w,) for n, w in zip("qkv", (wide, narrow, narrow), strict=True)
            }
    for name in ("ffn_gate", "ffn_up"):
        shapes[f"{name}.weight"] = (MLP, HIDDEN)
    shapes["ffn_down.weight"] = (HIDDEN, MLP)
    norms = {name: HIDDEN for name in NORMS if name not in kind.leaves_out} | dict(kind.norms)
    if not attention:
        del norms["attn_norm"]
    return shapes | {f"{name}.weight": (size,) for name, size in norms.items()}


def _random(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape, dtype=np.float32)


def _keys(
    arch: str, layers: Sequence[int], pattern: Sequence[bool] | None, bare: Sequence[int]
) -> dict[str, Any]:
    own = {
        "block_count": len(layers),
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": KINDS[arch].head,
        "attention.value_length": KINDS[arch].head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.layer_norm_epsilon": 1e-6,
        "rope.dimension_count": KINDS[arch].head,
        "rope.freq_base": 10000.0,
        **KINDS[arch].keys,
    }
    if pattern is not None:
        own["attention.sliding_window_pattern"] = list(pattern)
    if arch == "deci":
        for name, size in (("head_count", HEADS), ("head_count_kv", KV_HEADS)):
            own[f"attention.{name}"] = [0 if layer in bare else size for layer in layers]
        own["feed_forward_length"] = [MLP] * len(layers)
    bytes_of = [f"<0x{value:02X}>" for value in range(VOCAB - 3)]
    return {
        **{f"{arch}.{name}": value for name, value in own.items()},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_of],
        "tokenizer.ggml.scores": [0.0] * VOCAB,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * (VOCAB - 3)],
    }
