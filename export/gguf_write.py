"""A checkpoint as a GGUF file of plain floats: metadata, tokenizer, tensors one at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.export.gguf_arch import ZERO_MLP, Target
from shortstack.export.gguf_meta import add_metadata, rope_tensors
from shortstack.export.gguf_types import PRECISIONS
from shortstack.export.gguf_vocab import add_vocabulary, read_vocabulary
from shortstack.export.weights import Array, Weights, interleave_rope
from shortstack.families import TensorRule, expected_tensors
from shortstack.floats import to_bfloat16
from shortstack.progress import OnProgress

F16_MAX = 65504.0
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types that this module writes -> bytes a weight."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. `source` is its name in the checkpoint, None for zeros."""

    name: str
    shape: tuple[int, ...]
    source: str | None
    rule: TensorRule
    scale: float = 1.0

    @property
    def changed(self) -> bool:
        """Whether the numbers differ from the checkpoint's, so that they are rounded anew."""
        return self.scale != 1.0 or self.rule.plus != 0.0


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "the export to GGUF") from None
    return gguf


def entries(checkpoint: Checkpoint) -> list[Entry]:
    """Every tensor of the file but the rotation tables, in order."""
    target, family = Target.of(checkpoint), checkpoint.family
    found = []
    for name, rule, shape, layer in expected_tensors(family, checkpoint.dims):
        if name not in checkpoint.tensors:
            continue
        gguf_name = rule.gguf if layer is None else f"blk.{layer}.{rule.gguf}"
        if layer in target.no_attention and rule.gguf.startswith("attn_"):
            continue
        if layer in target.no_mlp and rule.part == "mlp":
            if rule.gguf.endswith(".weight"):
                found.append(Entry(gguf_name, _narrow(rule, shape), None, rule))
            continue
        found.append(Entry(gguf_name, shape, name, rule, _scale(target, family.layer, rule)))
    return found


def _narrow(rule: TensorRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(
        ZERO_MLP if symbol == "ff" else n for symbol, n in zip(rule.shape, shape, strict=True)
    )


def _scale(target: Target, layer: tuple[TensorRule, ...], rule: TensorRule) -> float:
    """Where the attention scale is mended: in the norm of the queries, else in their weights."""
    has_norm = any(r.gguf == "attn_q_norm.weight" for r in layer)
    mended = ("attn_q_norm.weight",) if has_norm else ("attn_q.weight", "attn_q.bias")
    return target.query_scale if rule.gguf in mended else 1.0


def write_floats(
    checkpoint: Checkpoint, target: Path, kind: str | None, progress: OnProgress
) -> None:
    """Write a file of plain floats, one tensor in memory; `kind` None keeps the stored types."""
    gguf = gguf_package()
    weights = Weights(checkpoint)
    writer = gguf.GGUFWriter(str(target), Target.of(checkpoint).arch.name)
    file_type = PRECISIONS[kind or "F32"].file_type
    name = Path(str(checkpoint.config.get("_name_or_path") or checkpoint.path)).name
    add_metadata(writer, checkpoint, name, file_type)
    add_vocabulary(writer, read_vocabulary(checkpoint.path, checkpoint.dims["vocab"]))
    plan = [(entry, kind_of(checkpoint, entry, kind)) for entry in entries(checkpoint)]
    tables = rope_tensors(checkpoint)
    for table_name, table in tables.items():
        writer.add_tensor_info(table_name, table.shape, table.dtype, table.nbytes)
    for entry, stored in plan:
        n_bytes = math.prod(entry.shape) * FLOATS[stored]
        raw = gguf.GGMLQuantizationType[stored]
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), n_bytes, raw_dtype=raw
        )
    with disk_errors(target), _closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for table in tables.values():
            writer.write_tensor_data(table)
        for done, (entry, stored) in enumerate(plan, 1):
            writer.write_tensor_data(_converted(checkpoint, weights, entry, stored))
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


def kind_of(checkpoint: Checkpoint, entry: Entry, kind: str | None) -> str:
    """The type to write a tensor in: vectors are F32, as llama.cpp wants them."""
    if len(entry.shape) == 1 or entry.source is None:
        return "F32" if len(entry.shape) == 1 or kind is None else kind
    if kind is not None:
        return kind
    stored = checkpoint.tensors[entry.source].dtype
    return stored if stored in FLOATS and not entry.changed else "F32"


def _converted(checkpoint: Checkpoint, weights: Weights, entry: Entry, kind: str) -> Array:
    if entry.source is None:
        return np.zeros(entry.shape, np.uint16 if kind == "BF16" else _numpy_type(kind))
    stored = checkpoint.tensors[entry.source].dtype
    same = kind == stored and not entry.changed
    array = weights.stored(entry.source) if same else weights.float32(entry.source)
    if entry.changed:
        array = (array + np.float32(entry.rule.plus)) * np.float32(entry.scale)
    heads = _interleaved_heads(checkpoint, entry.rule)
    if heads:
        array = interleave_rope(array, heads)
    if same or kind == "F32":
        return np.ascontiguousarray(array)
    return to_bfloat16(array) if kind == "BF16" else _to_float16(entry.source, array)


def _numpy_type(kind: str) -> type[np.floating[Any]]:
    return np.float16 if kind == "F16" else np.float32


def _interleaved_heads(checkpoint: Checkpoint, rule: TensorRule) -> int:
    """In how many heads the rows are put into rotation pairs; 0 where they stay."""
    if rule.rope_heads:
        return checkpoint.dims[rule.rope_heads]
    part = rule.gguf.partition(".")[0]
    names = {"attn_q": "heads", "attn_k": "kv_heads"}
    if part in names and Target.of(checkpoint).interleaves_all:
        return checkpoint.dims[names[part]]
    return 0


def _to_float16(name: str, array: Array) -> Array:
    peak = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
    if peak > F16_MAX:
        raise ShortstackError(
            f"{name} holds {peak:.0f}, beyond the {F16_MAX:.0f} that F16 can hold. "
            "Export to F32 or BF16."
        )
    return array.astype(np.float16)
