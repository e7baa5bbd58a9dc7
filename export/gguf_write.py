"""A checkpoint as a GGUF file of plain floats: metadata, tokenizer, tensors one at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.export.gguf_meta import add_metadata, rope_factors
from shortstack.export.gguf_types import PRECISIONS, TYPES
from shortstack.export.gguf_vocab import add_vocabulary, read_vocabulary
from shortstack.export.weights import Array, Weights, interleave_rope
from shortstack.families import TensorRule, expected_tensors, rope_parameters
from shortstack.floats import to_bfloat16
from shortstack.progress import OnProgress

F16_MAX = 65504.0


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "the export to GGUF") from None
    return gguf


def stored_tensors(checkpoint: Checkpoint) -> Iterator[tuple[TensorRule, tuple[int, ...], str]]:
    """The tensors that the checkpoint holds, in the table's order."""
    for name, rule, shape, _ in expected_tensors(checkpoint.family, checkpoint.dims):
        if name in checkpoint.tensors:
            yield rule, shape, name


def write_floats(
    checkpoint: Checkpoint, target: Path, kind: str | None, progress: OnProgress
) -> None:
    """Write a file of plain floats, one tensor in memory; `kind` None keeps the stored types."""
    gguf = gguf_package()
    weights = Weights(checkpoint)
    writer = gguf.GGUFWriter(str(target), checkpoint.family.gguf_arch)
    file_type = PRECISIONS[kind or "F32"].file_type
    name = Path(str(checkpoint.config.get("_name_or_path") or checkpoint.path)).name
    add_metadata(writer, checkpoint, name, file_type)
    add_vocabulary(writer, read_vocabulary(checkpoint.path, checkpoint.dims["vocab"]))
    plan = [
        (name, rule, kind_of(checkpoint, name, kind), _gguf_name(checkpoint, name, rule))
        for rule, _, name in stored_tensors(checkpoint)
    ]
    factors = _rope_factors(checkpoint)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, _, stored, gguf_name in plan:
        shape = checkpoint.tensors[name].shape
        n_bytes = math.prod(shape) * int(TYPES[stored].bits) // 8
        raw = gguf.GGMLQuantizationType[stored]
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), n_bytes, raw_dtype=raw)
    with disk_errors(target), _closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for done, (name, rule, stored, _) in enumerate(plan, 1):
            writer.write_tensor_data(_converted(checkpoint, weights, name, rule, stored))
            progress(done, len(plan))


@contextlib.contextmanager
def _closing(writer: Any) -> Iterator[None]:
    """Close the files; a failure to flush counts only if nothing failed before."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()
        raise
    writer.close()


def kind_of(checkpoint: Checkpoint, name: str, kind: str | None) -> str:
    """The type to write a tensor in: vectors are F32, as llama.cpp wants them."""
    info = checkpoint.tensors[name]
    if len(info.shape) == 1:
        return "F32"
    if kind is not None:
        return kind
    return info.dtype if info.dtype in TYPES else "F32"


def _gguf_name(checkpoint: Checkpoint, name: str, rule: TensorRule) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    prefix, suffix = checkpoint.family.layer_prefix.split("{i}")
    if not name.startswith(prefix):
        return rule.gguf
    index = name.removeprefix(prefix).partition(suffix)[0]
    return f"blk.{index}.{rule.gguf}"


def _rope_factors(checkpoint: Checkpoint) -> Array | None:
    rope = rope_parameters(checkpoint.text)
    if rope["rope_type"] != "llama3":
        return None
    return rope_factors(rope, checkpoint.dims["head_dim"])


def _converted(
    checkpoint: Checkpoint, weights: Weights, name: str, rule: TensorRule, kind: str
) -> Array:
    info = checkpoint.tensors[name]
    array = weights.stored(name) if kind == info.dtype else weights.float32(name)
    if rule.rope_heads:
        array = interleave_rope(array, checkpoint.dims[rule.rope_heads])
    if kind == info.dtype or kind == "F32":
        return np.ascontiguousarray(array)
    if kind == "BF16":
        return to_bfloat16(array)
    peak = float(np.abs(array).max(initial=0.0))
    if peak > F16_MAX:
        raise ShortstackError(
            f"{name} holds {peak:.0f}, beyond the {F16_MAX:.0f} that F16 can hold. "
            "Export to F32 or BF16."
        )
    return array.astype(np.float16)
