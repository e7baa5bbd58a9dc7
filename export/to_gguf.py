"""Checkpoint -> one GGUF file: written by the gguf package, quantized by libllama."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint, hash_files
from shortstack.disk import disk_errors, require_space
from shortstack.errors import MissingExtraError, ShortstackError, require, unknown
from shortstack.export.gguf_meta import (
    add_metadata,
    check_config,
    rope_factors,
)
from shortstack.export.gguf_quantize import quantize
from shortstack.export.gguf_vocab import add_vocabulary, read_vocabulary
from shortstack.export.weights import Array, Weights, interleave_rope, to_bfloat16
from shortstack.families import TensorRule, expected_tensors, rope_parameters, window_note
from shortstack.progress import OnProgress, silent

F16_MAX = 65504.0


@dataclass(frozen=True)
class TypeFacts:
    """A tensor type of GGUF: bits a weight, and what a row must be a multiple of."""

    bits: float
    block: int


TYPES: dict[str, TypeFacts] = {
    "F32": TypeFacts(32, 1),
    "F16": TypeFacts(16, 1),
    "BF16": TypeFacts(16, 1),
    "Q8_0": TypeFacts(8.5, 32),
    "Q5_1": TypeFacts(6, 32),
    "Q5_0": TypeFacts(5.5, 32),
    "Q4_1": TypeFacts(5, 32),
    "Q4_0": TypeFacts(4.5, 32),
    "Q6_K": TypeFacts(6.5625, 256),
    "Q5_K": TypeFacts(5.5, 256),
    "Q4_K": TypeFacts(4.5, 256),
}

FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
"""What libllama takes where a row is no multiple of 256."""


@dataclass(frozen=True)
class Precision:
    """A file type: its number in llama.h, the type of most weights and of the head by default."""

    file_type: int
    body: str
    head: str
    quantized: bool = True


PRECISIONS: dict[str, Precision] = {
    "F32": Precision(0, "F32", "F32", quantized=False),
    "F16": Precision(1, "F16", "F16", quantized=False),
    "BF16": Precision(32, "BF16", "BF16", quantized=False),
    "Q8_0": Precision(7, "Q8_0", "Q8_0"),
    "Q6_K": Precision(18, "Q6_K", "Q6_K"),
    "Q5_K_M": Precision(17, "Q5_K", "Q6_K"),
    "Q4_K_M": Precision(15, "Q4_K", "Q6_K"),
    "Q4_1": Precision(3, "Q4_1", "Q6_K"),
    "Q4_0": Precision(2, "Q4_0", "Q6_K"),
}

OPTIONS = ("head", "embedding")
"""`head`: type of the output matrix; `embedding`: of the token table. Tied, they are one."""


def check(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    check_headers(checkpoint, spec)
    read_vocabulary(checkpoint.path, checkpoint.dims["vocab"])


def check_headers(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    """The part of `check` that needs no tokenizer: the checkpoint may not lie on disk yet."""
    require(("gguf", "llama_cpp"), "gguf", "the export to GGUF")
    if spec.precision not in PRECISIONS:
        raise unknown("GGUF precision", spec.precision, PRECISIONS)
    for option, value in spec.options:
        if option not in OPTIONS:
            raise unknown("option of the gguf export", option, OPTIONS)
        if value not in TYPES:
            raise unknown(f"GGUF type for {option}", value, TYPES)
        width = checkpoint.dims["d"]
        if width % TYPES[value].block:
            fits = [name for name, facts in TYPES.items() if width % facts.block == 0]
            raise ShortstackError(
                f"{option}: {value} needs rows that are multiples of {TYPES[value].block}, this "
                f"model's have {width}. Choose one of: {', '.join(fits)}."
            )
    head, embedding = spec.option("head"), spec.option("embedding")
    if checkpoint.tied and head and embedding and head != embedding:
        raise ShortstackError(
            f"head {head} and embedding {embedding} differ, but this model's head is its "
            "embedding: one table, one type. Give only one of them."
        )
    check_config(checkpoint)


def predict(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, int]:
    """Sizes by the tables above; libllama gives some K-quant tensors more bits, so ± 10 %."""
    check_headers(checkpoint, spec)
    precision = PRECISIONS[spec.precision]
    size = largest = 0
    for rule, shape, hf_name in _tensors(checkpoint):
        n_params = math.prod(shape)
        largest = max(largest, n_params)
        kind = _predicted_type(checkpoint, spec, precision, rule, shape)
        size += int(n_params * TYPES[kind].bits / 8)
        del hf_name
    size += 64 * checkpoint.dims["vocab"]  # tokenizer
    intermediate = _intermediate_bytes(checkpoint) if _needs_quantizer(spec) else 0
    return {
        "size_bytes": size,
        "peak_ram_bytes": 150_000_000 + 8 * largest + intermediate,
        "disk_bytes": size + intermediate,
    }


def export(
    checkpoint: Checkpoint, spec: ExportSpec, out: Path, *, progress: OnProgress = silent
) -> Artifact:
    """Write `out`/model-PRECISION.gguf.

    Quantized files are made from an intermediate file that keeps the checkpoint's own types, so
    that weights are rounded once.
    """
    check(checkpoint, spec)
    require_space(out, predict(checkpoint, spec)["disk_bytes"])
    target = out / f"model-{spec.precision}.gguf"
    vocabulary = read_vocabulary(checkpoint.path, checkpoint.dims["vocab"])
    notes = [*window_note(checkpoint.config), *filter(None, (vocabulary.note,))]
    if _needs_quantizer(spec):
        source = out / "intermediate.gguf"
        try:
            _write(checkpoint, source, None, progress)
            notes += quantize(source, target, _quantize_request(checkpoint, spec))
        finally:
            source.unlink(missing_ok=True)
    else:
        _write(checkpoint, target, spec.precision, progress)
    table = read_table(target)
    return Artifact(
        path=target,
        spec=spec,
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=target.stat().st_size,
        weight_bytes_per_token=_bytes_per_token(table),
        sha256=hash_files(out, [target.name]),
        source_sha256=checkpoint.sha256,
        notes=(*notes, _types_note(table)),
    )


@dataclass(frozen=True)
class TableRow:
    """One line of a GGUF file's tensor table."""

    name: str
    type: str
    n_bytes: int


def read_table(path: Path) -> list[TableRow]:
    reader = _gguf().GGUFReader(path)
    return [TableRow(t.name, t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors]


def _bytes_per_token(table: list[TableRow]) -> int:
    """All tensors; the token table only where it is also the head, as decoding gathers one row."""
    untied = any(row.name == "output.weight" for row in table)
    return sum(row.n_bytes for row in table if not (untied and row.name == "token_embd.weight"))


def _types_note(table: list[TableRow]) -> str:
    counts = Counter(row.type for row in table if row.name.endswith(".weight"))
    return "tensor types: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "the export to GGUF") from None
    return gguf


def _needs_quantizer(spec: ExportSpec) -> bool:
    return PRECISIONS[spec.precision].quantized or bool(spec.options)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[TensorRule, tuple[int, ...], str]]:
    """The tensors that the checkpoint holds, in the table's order."""
    for name, rule, shape, _ in expected_tensors(checkpoint.family, checkpoint.config):
        if name in checkpoint.tensors:
            yield rule, shape, name


def _predicted_type(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    precision: Precision,
    rule: TensorRule,
    shape: tuple[int, ...],
) -> str:
    if len(shape) == 1:
        return "F32"
    embedding = rule is not checkpoint.family.head and rule.shape[0] == "vocab"
    is_head = rule is checkpoint.family.head or (embedding and checkpoint.tied)
    if is_head:
        kind = spec.option("head") or (spec.option("embedding") if embedding else None)
        kind = kind or precision.head
    elif embedding:
        kind = spec.option("embedding") or precision.body
    else:
        kind = precision.body
    return kind if shape[-1] % TYPES[kind].block == 0 else FALLBACK[kind]


def _intermediate_bytes(checkpoint: Checkpoint) -> int:
    return checkpoint.n_bytes + 64 * checkpoint.dims["vocab"]


def _quantize_request(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, Any]:
    head, embedding = spec.option("head"), spec.option("embedding")
    if checkpoint.tied:  # one table: llama.cpp knows it as the embedding
        head = embedding = head or embedding
    return {
        "file_type": PRECISIONS[spec.precision].file_type,
        "head": head,
        "embedding": embedding,
    }


def _write(checkpoint: Checkpoint, target: Path, kind: str | None, progress: OnProgress) -> None:
    """Write a file of plain floats, one tensor in memory; `kind` None keeps the stored types."""
    gguf = _gguf()
    weights = Weights(checkpoint)
    writer = gguf.GGUFWriter(str(target), checkpoint.family.gguf_arch)
    file_type = PRECISIONS[kind or "F32"].file_type
    name = Path(str(checkpoint.config.get("_name_or_path") or checkpoint.path)).name
    add_metadata(writer, checkpoint, name, file_type)
    add_vocabulary(writer, read_vocabulary(checkpoint.path, checkpoint.dims["vocab"]))
    plan = [
        (name, rule, kind_of(checkpoint, name, kind), _gguf_name(checkpoint, name, rule))
        for rule, _, name in _tensors(checkpoint)
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
    rope = rope_parameters(checkpoint.config)
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
