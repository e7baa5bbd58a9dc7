"""A GGUF file without some of its layers: one pass over the file, quantized bytes untouched."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shortstack.disk import disk_errors, require_space
from shortstack.errors import ShortstackError
from shortstack.gguf_archs import MAX_LAYERS
from shortstack.gguf_header import (
    MAGIC,
    GgufHeader,
    TensorEntry,
    check_vocabulary,
    encode_string,
    read_header,
)
from shortstack.progress import OnProgress, silent
from shortstack.prune.gguf_keys import KeyEdits, edit_keys, layer_of, load_arch, scale_of
from shortstack.prune.plan import PrunePlan

COPY_BYTES = 2**26
"""Copied between two reports of progress."""
BUFFER_BYTES = 2**23

Piece = bytes | range
"""Bytes of the new file: as they are, or as a range of the source."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor that stays: its new table row, where its bytes lie, and what its values are
    multiplied with (F32 only) if not 1."""

    entry: TensorEntry
    source_at: int
    factor: float = 1.0


@dataclass(frozen=True)
class GgufCut:
    """What a cut file is to be made of. Nothing is written yet."""

    header: GgufHeader
    plan: PrunePlan
    edits: KeyEdits
    tensors: tuple[NewTensor, ...]

    @property
    def head(self) -> list[Piece]:
        """The new file up to its data, padding included."""
        pieces: list[Piece] = [
            struct.pack("<4sIQQ", MAGIC, self.header.version, len(self.tensors), self.edits.count)
        ]
        pieces += self.edits.pieces
        pieces += (_table_row(tensor.entry) for tensor in self.tensors)
        size = sum(map(len, pieces))
        return [*pieces, bytes(-size % self.header.alignment)]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.head)) + sum(
            _padded(tensor.entry.n_bytes, self.header.alignment) for tensor in self.tensors
        )


def plan_cut(source: Path, plan: PrunePlan | tuple[int, ...]) -> GgufCut:
    """Read the header of `source` and say what its cut would be made of.

    Raises ShortstackError for a damaged file, and by name for all that cannot be cut exactly:
    unknown architectures and arrays, rhythms that no key can express, split files.
    """
    header = read_header(source)
    check_vocabulary(header)
    arch = load_arch(header)
    n_layers = header.integer(f"{arch.name}.block_count")
    if not 0 < n_layers <= MAX_LAYERS:
        raise ShortstackError(
            f"{source} says it has {n_layers} layers; llama.cpp reads 1 to {MAX_LAYERS}. "
            "Download it again."
        )
    if isinstance(plan, tuple):
        plan = PrunePlan(n_layers, plan, "explicit")
    _check_plan(header, plan, n_layers)
    edits = edit_keys(header, arch, plan.keep)
    places = {layer: place for place, layer in enumerate(plan.keep)}
    tensors = tuple(_kept_tensors(header, n_layers, places, edits))
    return GgufCut(header, plan, edits, tensors)


def check_free(target: Path) -> None:
    """Raise ShortstackError if `target` is there already."""
    if target.exists() or target.is_symlink():
        raise ShortstackError(f"{target} exists: it is not overwritten. Choose another -o.")


def accept(file: Path) -> None:
    """Take any file."""


def cut_gguf(
    cut: GgufCut,
    target: Path,
    progress: OnProgress = silent,
    *,
    check: Callable[[Path], None] = accept,
) -> str:
    """Write the cut file, whole or not at all; return its sha256.

    `progress` counts bytes. `check` sees the whole file before it gets its name, and may raise.
    Raises ShortstackError if `target` exists or the disk is full.
    """
    check_free(target)
    require_space(target, cut.n_bytes)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with disk_errors(target):
            write_cut(cut, partial, progress)
            sha256 = _settle(partial, check)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return sha256


def write_cut(cut: GgufCut, target: Path, progress: OnProgress = silent) -> None:
    """Write the file in one pass, without a temporary name and without waiting for the disk."""
    total, done = cut.n_bytes, 0
    with cut.header.file.open("rb") as source, target.open("wb") as out:
        for piece in cut.head:
            if isinstance(piece, range):
                _copy(source, out, piece)
            else:
                out.write(piece)
        for tensor in cut.tensors:
            size = tensor.entry.n_bytes
            place = range(tensor.source_at, tensor.source_at + size)
            if tensor.factor == 1.0:
                for part in _parts(place):
                    _copy(source, out, part)
                    progress(done + part.stop - place.start, total)
            else:
                out.write(_scaled(source, place, tensor.factor))
            out.write(bytes(-size % cut.header.alignment))
            done += _padded(size, cut.header.alignment)
            progress(done, total)
        progress(total, total)


def _check_plan(header: GgufHeader, plan: PrunePlan, n_layers: int) -> None:
    if plan.n_layers != n_layers:
        raise ShortstackError(
            f"the plan is for {plan.n_layers} layers, {header.file} has {n_layers}. Plan again."
        )
    if plan.attention or plan.mlp or plan.merge or plan.replace:
        raise ShortstackError(
            f"a GGUF file loses whole layers only, the plan changes other parts of "
            f"{header.file}. Cut into a folder (-o NAME) and export that."
        )
    if not plan.drop:
        raise ShortstackError("there is no layer to drop. Name some, e.g. --drop 11-15")


def _kept_tensors(
    header: GgufHeader, n_layers: int, places: dict[int, int], edits: KeyEdits
) -> Iterator[NewTensor]:
    at = 0
    for tensor in header.tensors:
        layer = layer_of(header, tensor.name, n_layers)
        if layer is not None and layer not in places:
            continue
        name = tensor.name
        if layer is not None:
            name = f"blk.{places[layer]}." + name.split(".", 2)[2]
        entry = TensorEntry(name, tensor.dims, tensor.kind, at, tensor.n_bytes)
        factor = scale_of(header, edits, tensor)
        yield NewTensor(entry, header.data_start + tensor.offset, factor)
        at += _padded(tensor.n_bytes, header.alignment)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _table_row(entry: TensorEntry) -> bytes:
    dims = entry.dims
    return encode_string(entry.name) + struct.pack(
        f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind, entry.offset
    )


def _parts(place: range) -> Iterable[range]:
    starts = range(place.start, place.stop, COPY_BYTES)
    return (range(start, min(start + COPY_BYTES, place.stop)) for start in starts)


def _copy(source: BinaryIO, out: BinaryIO, place: range) -> None:
    """Append a range of the source; by the kernel where it can, without passing our memory."""
    out.flush()
    at = place.start
    try:
        while at < place.stop:
            copied = os.copy_file_range(source.fileno(), out.fileno(), place.stop - at, at)
            if not copied:
                break
            at += copied
    except (AttributeError, OSError):  # another system, or a pair of disks that cannot
        pass
    if at < place.stop:
        _copy_through_memory(source, out, range(at, place.stop))


def _copy_through_memory(source: BinaryIO, out: BinaryIO, place: range) -> None:
    source.seek(place.start)
    left = len(place)
    while left:
        chunk = source.read(min(left, BUFFER_BYTES))
        if not chunk:
            raise ShortstackError(f"{source.name} became shorter while it was read. Try again.")
        out.write(chunk)
        left -= len(chunk)


def _scaled(source: BinaryIO, place: range, factor: float) -> bytes:
    source.seek(place.start)
    count = len(place) // 4
    values = struct.unpack(f"<{count}f", source.read(len(place)))
    return struct.pack(f"<{count}f", *(value * factor for value in values))


def _settle(file: Path, check: Callable[[Path], None]) -> str:
    """Wait until the file is on the disk; hash and check it meanwhile."""
    with file.open("rb+") as stream, file.open("rb") as again, ThreadPoolExecutor(2) as pool:
        settled = pool.submit(os.fsync, stream.fileno())
        sha256 = pool.submit(hashlib.file_digest, again, "sha256")
        check(file)
        settled.result()
        return sha256.result().hexdigest()
