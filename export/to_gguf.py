"""Checkpoint -> one GGUF file: written by the gguf package, quantized by libllama."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack import activations, families
from shortstack.activations import refuse_float16
from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint, hash_digests, hash_file, hashed_meanwhile
from shortstack.disk import require_space
from shortstack.errors import VerificationError, require, unknown
from shortstack.export import gguf_chunks, gguf_quantize, gguf_vocab, importance
from shortstack.export.gguf_arch import Target, least_runtime, target_notes
from shortstack.export.gguf_codes import check_codes, keeps_codes
from shortstack.export.gguf_meta import check_config
from shortstack.export.gguf_mix import Choice, is_matrix
from shortstack.export.gguf_options import (
    check_options,
    overrides,
    refuse_without_text,
    types_of,
    wants_importance,
)
from shortstack.export.gguf_quantize import quantize
from shortstack.export.gguf_types import PRECISIONS, TYPES
from shortstack.export.gguf_vocab import read_vocabulary
from shortstack.export.gguf_write import entries, write_floats
from shortstack.export.importance_file import FILE as IMPORTANCE
from shortstack.export.removed import check_removed
from shortstack.footprint import PROCESS_BYTES
from shortstack.gguf_header import GGML_TYPES, read_header
from shortstack.multiplied import of_gguf
from shortstack.progress import OnProgress, silent
from shortstack.row_codes import RowCodesReader

REVISION = 1
LIBRARIES_BYTES = 12_000_000
"""gguf and numpy, where nothing needed them before."""


def check(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    check_headers(checkpoint, spec)
    read_vocabulary(checkpoint.path, checkpoint.dims["vocab"])


def check_headers(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    """The part of `check` that needs no tokenizer: the checkpoint may not lie on disk yet."""
    require(("gguf", "llama_cpp"), "gguf", "the export to GGUF")
    if spec.precision not in PRECISIONS:
        raise unknown("GGUF precision", spec.precision, PRECISIONS)
    check_options(checkpoint, spec, tensor_shapes(checkpoint))
    check_config(checkpoint)
    if keeps_codes(checkpoint, spec):
        changed = [entry.source for entry in entries(checkpoint) if entry.changed and entry.source]
        check_codes(checkpoint, spec, changed, RowCodesReader.of(checkpoint).names)


def predict(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, int]:
    """Sizes by libllama's own mixes; what the tokenizer takes is estimated."""
    check_headers(checkpoint, spec)
    shapes = tensor_shapes(checkpoint)
    chosen = types_of(checkpoint, spec, shapes)
    size = 64 * checkpoint.dims["vocab"]  # tokenizer
    for name, shape in shapes.items():
        kind = chosen[name].type if name in chosen else "F32"
        size += math.prod(shape[:-1]) * TYPES[kind].row_bytes(shape[-1])
    intermediate = _intermediate_bytes(checkpoint) if _needs_quantizer(checkpoint, spec) else 0
    writing = _writing_bytes(checkpoint, spec)
    observing = importance.peak_ram_bytes(checkpoint) if calibrates(checkpoint, spec) else 0
    return {
        "size_bytes": size,
        "peak_ram_bytes": PROCESS_BYTES + max(writing, observing),
        "writing_ram_bytes": PROCESS_BYTES + writing,
        "disk_bytes": size + intermediate,
    }


def _writing_bytes(checkpoint: Checkpoint, spec: ExportSpec) -> int:
    """Memory of the export behind its calibration, beyond what the process holds anyway."""
    found, quantized = entries(checkpoint), _needs_quantizer(checkpoint, spec)
    plain = not (quantized or keeps_codes(checkpoint, spec))
    kind = spec.precision if plain else None
    taken = LIBRARIES_BYTES + gguf_vocab.peak_bytes(checkpoint.path, checkpoint.dims["vocab"])
    taken += gguf_chunks.peak_bytes(checkpoint, found, kind)
    if quantized:
        taken += gguf_quantize.peak_bytes(max(math.prod(entry.shape) for entry in found))
    return taken


def context_tokens(checkpoint: Checkpoint, spec: ExportSpec) -> int | None:
    """The model's context; its sliding window where the architecture has none."""
    return families.context_tokens(checkpoint.config, windowed=Target.of(checkpoint).has_windows)


def calibrates(checkpoint: Checkpoint, spec: ExportSpec) -> bool:
    """For an importance matrix, and before anything is written as F16."""
    shapes = tensor_shapes(checkpoint)
    chosen = types_of(checkpoint, spec, shapes).values()
    return wants_importance(checkpoint, spec, shapes) or any(c.type == "F16" for c in chosen)


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name in the GGUF file -> shape."""
    return {entry.name: entry.shape for entry in entries(checkpoint)}


def export(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    out: Path,
    *,
    calibration: Sequence[Sequence[int]] = (),
    progress: OnProgress = silent,
) -> Artifact:
    """Write `out`/model-PRECISION.gguf.

    Quantized files are made from an intermediate file that keeps the checkpoint's own types, so
    that weights are rounded once. `calibration` (token windows) is what an importance matrix is
    computed on.
    """
    check(checkpoint, spec)
    check_removed(checkpoint)
    require_space(out, predict(checkpoint, spec)["disk_bytes"])
    shapes = tensor_shapes(checkpoint)
    chosen = types_of(checkpoint, spec, shapes)
    target = out / f"model-{spec.precision}.gguf"
    vocabulary = read_vocabulary(checkpoint.path, checkpoint.dims["vocab"])
    notes = [*target_notes(checkpoint), *filter(None, (vocabulary.note,))]
    matrix = out / IMPORTANCE if wants_importance(checkpoint, spec, shapes) else None
    notes += _calibrate(checkpoint, spec, chosen, calibration, matrix)
    notes += _codes_notes(checkpoint, spec)
    with hashed_meanwhile(checkpoint):
        file_sha256 = _write(checkpoint, spec, target, matrix, progress)
    table = read_table(target)
    _check_types(checkpoint, spec, target, table)
    multiplied = of_gguf(read_header(target))
    return Artifact(
        path=target,
        spec=spec,
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=target.stat().st_size,
        weight_bytes_per_token=_bytes_per_token(table),
        sha256=hash_digests([(target.name, file_sha256)]),
        source_sha256=checkpoint.sha256,
        least_runtime=least_runtime(checkpoint),
        notes=(
            *notes,
            *_fallback_notes(chosen, table),
            _types_note(table),
        ),
        matmul_params=multiplied.matmul_params,
        head_params=multiplied.head_params,
    )


def _write(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    target: Path,
    matrix: Path | None,
    progress: OnProgress,
) -> str:
    """Write the file; return its sha256."""
    if not _needs_quantizer(checkpoint, spec):
        digest = hashlib.sha256()
        kind, blocks = _kinds(checkpoint, spec)
        write_floats(checkpoint, target, kind, progress, digest, blocks)
        return digest.hexdigest()
    source = target.with_name("intermediate.gguf")
    try:
        write_floats(checkpoint, source, None, progress)
        quantize(source, target, _quantize_request(checkpoint, spec, matrix))
    finally:
        source.unlink(missing_ok=True)
    return hash_file(target)


def _calibrate(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    chosen: Mapping[str, Choice],
    windows: Sequence[Sequence[int]],
    matrix: Path | None,
) -> list[str]:
    """Run the model on calibration text where its result matters; write the file `matrix`.

    With F16 weights llama.cpp rounds what they are multiplied with to F16, too: inputs beyond its
    range would become infinite. Raises ShortstackError for these, and for missing text.
    """
    in_float16 = any(choice.type == "F16" for choice in chosen.values())
    if matrix is None and not (in_float16 and windows):
        return []
    if not windows:
        refuse_without_text(spec, chosen)
    seen = importance.observe(checkpoint, windows, matrix)
    if in_float16:
        refuse_float16(seen.inputs, f"{spec.precision} in GGUF", "Export to BF16 or Q8_0.")
    found = [*activations.notes(seen)]
    if matrix is not None:
        found.append(f"importance matrix from {seen.n_tokens} tokens of calibration text")
    return found


@dataclass(frozen=True)
class TableRow:
    """One line of a GGUF file's tensor table; `width` is the row length."""

    name: str
    type: str
    n_bytes: int
    width: int


def read_table(path: Path) -> list[TableRow]:
    """What the file says it holds, checked as any foreign file is."""
    return [
        TableRow(t.name, GGML_TYPES[t.kind].name, t.n_bytes, t.dims[0])
        for t in read_header(path).tensors
    ]


def _bytes_per_token(table: list[TableRow]) -> int:
    """All tensors; the token table only where it is also the head, as decoding gathers one row."""
    untied = any(row.name == "output.weight" for row in table)
    return sum(row.n_bytes for row in table if not (untied and row.name == "token_embd.weight"))


def _types_note(table: list[TableRow]) -> str:
    counts = Counter(row.type for row in table if row.name.endswith(".weight"))
    return "tensor types: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def _fallback_notes(chosen: Mapping[str, Choice], table: list[TableRow]) -> list[str]:
    """What the file's own table has instead of the types that the mix asks for, and why."""
    other = [row for row in table if row.name in chosen and row.type != chosen[row.name].wanted]
    if not other:
        return []
    counts = Counter((chosen[row.name].wanted, row.type) for row in other)
    widths = sorted({row.width for row in other})
    pairs = ", ".join(f"{n} {wanted} -> {got}" for (wanted, got), n in counts.most_common())
    return [
        f"{len(other)} of {len(chosen)} matrices fell back to another type, as their rows "
        f"({', '.join(map(str, widths))} long) are no whole blocks: {pairs}"
    ]


def _check_types(
    checkpoint: Checkpoint, spec: ExportSpec, target: Path, table: list[TableRow]
) -> None:
    """Read back what the options asked for. Raises VerificationError, and leaves no file."""
    asked = overrides(spec, tensor_shapes(checkpoint))
    tables = {"output.weight": spec.option("head"), "token_embd.weight": spec.option("embedding")}
    if checkpoint.tied:
        tables["token_embd.weight"] = tables["token_embd.weight"] or tables["output.weight"]
    asked |= {name: kind for name, kind in tables.items() if kind}
    for row in table:
        if asked.get(row.name, row.type) != row.type:
            target.unlink()
            raise VerificationError(
                f"{target.name}: {row.name} became {row.type}, asked for was {asked[row.name]}: "
                "this libllama does otherwise than the one we know. Leave the option out."
            )


def _kinds(checkpoint: Checkpoint, spec: ExportSpec) -> tuple[str | None, frozenset[str]]:
    """The type of a file's matrices, and which of them are written as Q8_0 because others have
    row codes."""
    if not keeps_codes(checkpoint, spec):
        return spec.precision, frozenset()
    chosen = types_of(checkpoint, spec, tensor_shapes(checkpoint))
    return None, frozenset(name for name, choice in chosen.items() if choice.type == "Q8_0")


def _codes_notes(checkpoint: Checkpoint, spec: ExportSpec) -> list[str]:
    if not keeps_codes(checkpoint, spec):
        return []
    n = len(RowCodesReader.of(checkpoint).names)
    return [f"{n} matrices keep their row codes: weights are codes x steps, exactly"]


def _needs_quantizer(checkpoint: Checkpoint, spec: ExportSpec) -> bool:
    if keeps_codes(checkpoint, spec):
        return False
    return PRECISIONS[spec.precision].quantized or any(
        spec.option(option) for option in ("head", "embedding", "tensors")
    )


def _intermediate_bytes(checkpoint: Checkpoint) -> int:
    return checkpoint.n_bytes + 64 * checkpoint.dims["vocab"]


def _quantize_request(
    checkpoint: Checkpoint, spec: ExportSpec, matrix: Path | None
) -> dict[str, Any]:
    head, embedding = spec.option("head"), spec.option("embedding")
    if checkpoint.tied:  # one table: llama.cpp knows it as the embedding
        head = embedding = head or embedding
    shapes = tensor_shapes(checkpoint)
    precision = PRECISIONS[spec.precision]
    named = overrides(spec, shapes)
    if named and not precision.quantized:
        # libllama heeds overrides only on the way to a quantized type: name every tensor.
        matrices = [name for name, shape in shapes.items() if is_matrix(name, shape)]
        named = {**dict.fromkeys(matrices, precision.body), **named}
    return {
        "file_type": precision.file_type,
        "head": head,
        "embedding": embedding,
        "overrides": named,
        "importance": str(matrix) if matrix else None,
    }
