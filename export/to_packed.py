"""Checkpoint -> one packed file: weights coded without loss (docs/packed.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from shortstack import families
from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import PACKED_SUFFIX, Checkpoint, hash_digests, hash_file
from shortstack.disk import require_space
from shortstack.errors import VerificationError, unknown
from shortstack.footprint import PROCESS_BYTES
from shortstack.multiplied import EMBEDDING, of_checkpoint
from shortstack.packed.choose import options
from shortstack.packed.file import PackedFile, expected_room, write_packed
from shortstack.packed.header import CHUNK_BYTES
from shortstack.packed.pack import Packing
from shortstack.packed.pack import table as worth_table
from shortstack.packed.prove import prove
from shortstack.packed.sources import left_out
from shortstack.packed.worth import WORTH
from shortstack.progress import OnProgress, silent

REVISION = 1
PRECISIONS = ("lossless",)
FILE = f"model{PACKED_SUFFIX}"


def check(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    if spec.precision not in PRECISIONS:
        raise unknown("precision of a packed file", spec.precision, PRECISIONS)
    options(dict(spec.options))


def predict(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, int]:
    """An upper bound of the size, as nobody knows what can be saved before it is tried."""
    check(checkpoint, spec)
    beside = sum(file.stat().st_size for file in checkpoint.tokenizer_files)
    size = checkpoint.n_bytes + beside + expected_room(checkpoint)
    return {
        "size_bytes": size,
        "peak_ram_bytes": PROCESS_BYTES + 12 * CHUNK_BYTES,
        "disk_bytes": size,
    }


def context_tokens(checkpoint: Checkpoint, spec: ExportSpec) -> int | None:
    return families.context_tokens(checkpoint.config, windowed=True)


def calibrates(checkpoint: Checkpoint, spec: ExportSpec) -> bool:
    return False


def export(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    out: Path,
    *,
    calibration: Sequence[Sequence[int]] = (),
    progress: OnProgress = silent,
) -> Artifact:
    """Write `out`/model.packed.safetensors, and beside it `worth.json`, a line a tensor.

    Raises VerificationError, and leaves no file, unless it unpacks to every byte it was made of.
    """
    check(checkpoint, spec)
    require_space(out, predict(checkpoint, spec)["disk_bytes"])
    target = out / FILE
    made = write_packed(checkpoint, target, options(dict(spec.options)), progress)
    try:
        unpack_s = prove(PackedFile(target), checkpoint)
    except VerificationError:
        target.unlink()
        raise
    rows = worth_table(made, unpack_s)
    (out / WORTH).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    multiplied = of_checkpoint(checkpoint)
    return Artifact(
        path=target,
        spec=spec,
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=target.stat().st_size,
        weight_bytes_per_token=_bytes_per_token(checkpoint),
        sha256=hash_digests([(target.name, hash_file(target))]),
        source_sha256=checkpoint.sha256,
        notes=_notes(checkpoint, target, made, sum(unpack_s.values())),
        matmul_params=multiplied.matmul_params,
        head_params=multiplied.head_params,
    )


def _bytes_per_token(checkpoint: Checkpoint) -> int:
    """Of the weights as PyTorch loads them: all but an embedding that is only gathered from."""
    tensors = checkpoint.tensors.items()
    if checkpoint.tied:
        return sum(info.n_bytes for _, info in tensors)
    return sum(info.n_bytes for name, info in tensors if not name.endswith(EMBEDDING))


def _notes(
    checkpoint: Checkpoint, target: Path, made: Sequence[Packing], unpack_s: float
) -> tuple[str, ...]:
    size, plain = target.stat().st_size, checkpoint.n_bytes
    kinds: dict[tuple[str, ...], int] = {}
    for packing in made:
        if packing.entry.is_tensor:
            key = (packing.entry.kind, "+".join(packing.entry.coders))
            kinds[key] = kinds.get(key, 0) + 1
    spoken = ", ".join(f"{n} {' '.join(key)}" for key, n in sorted(kinds.items()))
    bits = 8 * size / max(1, checkpoint.n_params)
    missing = left_out(checkpoint)
    return (
        f"{plain / 1e6:,.1f} MB of weights in {size / 1e6:,.1f} MB: {plain / size:.3f} x, "
        f"{bits:.2f} bits a weight",
        f"unpacked in memory and compared bit for bit, {plain / 1e6 / max(unpack_s, 1e-9):,.0f} "
        "MB/s",
        f"tensors: {spoken}",
        *([f"left out, as no model needs them: {', '.join(missing)}"] if missing else []),
    )
