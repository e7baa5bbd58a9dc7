"""Checkpoint -> one GGUF file: written by the gguf package, quantized by libllama."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint, hash_files
from shortstack.disk import require_space
from shortstack.errors import ShortstackError, require, unknown
from shortstack.export.gguf_meta import check_config
from shortstack.export.gguf_quantize import quantize
from shortstack.export.gguf_types import FALLBACK, PRECISIONS, TYPES, Precision
from shortstack.export.gguf_vocab import read_vocabulary
from shortstack.export.gguf_write import gguf_package, stored_tensors, write_floats
from shortstack.families import TensorRule, window_note
from shortstack.progress import OnProgress, silent

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
    for rule, shape, hf_name in stored_tensors(checkpoint):
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
            write_floats(checkpoint, source, None, progress)
            notes += quantize(source, target, _quantize_request(checkpoint, spec))
        finally:
            source.unlink(missing_ok=True)
    else:
        write_floats(checkpoint, target, spec.precision, progress)
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
    reader = gguf_package().GGUFReader(path)
    return [TableRow(t.name, t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors]


def _bytes_per_token(table: list[TableRow]) -> int:
    """All tensors; the token table only where it is also the head, as decoding gathers one row."""
    untied = any(row.name == "output.weight" for row in table)
    return sum(row.n_bytes for row in table if not (untied and row.name == "token_embd.weight"))


def _types_note(table: list[TableRow]) -> str:
    counts = Counter(row.type for row in table if row.name.endswith(".weight"))
    return "tensor types: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def _needs_quantizer(spec: ExportSpec) -> bool:
    return PRECISIONS[spec.precision].quantized or bool(spec.options)


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
