"""What a checkpoint has to pack, in order: files, then shard by shard its head and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shortstack.checkpoint import DTYPE_BYTES, SIDECAR, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.manifest import MANIFEST
from shortstack.packed.coders import Bytes
from shortstack.packed.header import FILES, names_a_shard
from shortstack.packed.tensors import dequantize
from shortstack.row_codes import RowCodesReader
from shortstack.safetensors_header import parse_head, read_head

ReadBytes = Callable[[int, int], Bytes]
"""Bytes of elements `start` to `stop`, as the checkpoint stores them."""


@dataclass(frozen=True)
class Source:
    """One thing to pack. `kind` is `file`, `shard` or, of tensors, `tensor`; `codes` is the sidecar
    of a matrix that has row codes."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    read: ReadBytes
    codes: RowCodesReader | None = None

    @property
    def is_tensor(self) -> bool:
        return self.kind == "tensor"

    @property
    def blob(self) -> str:
        """Name of the blob, as header.Entry has it."""
        return f"{self.kind}:{self.name}"

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES.get(self.dtype, 1)

    @property
    def columns(self) -> int:
        return max(1, self.shape[-1]) if self.shape else 1

    def read_codes(self, start: int, stop: int) -> tuple[Bytes, Bytes]:
        """Codes and steps of the whole rows from element `start` to `stop`, as bytes.

        Raises ShortstackError where they are not the weights, bit for bit.
        """
        assert self.codes is not None
        rows = self.codes.read(self.name, start // self.columns, stop // self.columns)
        codes = np.ascontiguousarray(rows.codes).view(np.uint8).reshape(-1)
        steps = np.ascontiguousarray(rows.steps, "<f2").view(np.uint8)
        if not np.array_equal(dequantize(codes, steps, self.columns), self.read(start, stop)):
            raise self.codes.unlike(self.name)
        return codes, steps


def sources(checkpoint: Checkpoint) -> Iterator[Source]:
    """Everything that makes the folder again, byte for byte."""
    for name in sorted(FILES):
        file = checkpoint.path / name
        if file.is_file():
            yield _whole(name, "file", file.read_bytes())
    sidecar = RowCodesReader.of(checkpoint)
    for shard in checkpoint.shards:
        yield from _shard(checkpoint.path, shard, sidecar)
    if sidecar.head:
        yield _whole(SIDECAR, "shard", sidecar.head)


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Names of files in the folder that are not packed: no reader of models asks for them."""
    known = {*FILES, *checkpoint.shards, SIDECAR, MANIFEST}
    return sorted(file.name for file in checkpoint.path.iterdir() if file.name not in known)


def _whole(name: str, kind: str, content: bytes) -> Source:
    data = np.frombuffer(content, np.uint8)
    return Source(name, kind, "U8", (data.size,), lambda start, stop: data[start:stop])


def _shard(folder: Path, name: str, sidecar: RowCodesReader) -> Iterator[Source]:
    if not names_a_shard(name):
        raise ShortstackError(
            f"{folder / name}: unpacking could not write a file of this name everywhere. "
            "Rename it, also in model.safetensors.index.json."
        )
    path = folder / name
    with path.open("rb") as file:
        head = read_head(file, path)
        yield _whole(path.name, "shard", head)
        for slot in parse_head(head, str(path)):
            codes = sidecar if slot.name in sidecar.names else None
            yield Source(
                slot.name,
                "tensor",
                slot.dtype,
                slot.shape,
                _range_reader(path, len(head) + slot.begin, slot.dtype),
                codes,
            )


def _range_reader(path: Path, begin: int, dtype: str) -> ReadBytes:
    itemsize = DTYPE_BYTES[dtype]

    def read(start: int, stop: int) -> Bytes:
        with path.open("rb") as file:  # not mapped: pages of a map would count as our memory
            file.seek(begin + start * itemsize)
            data = file.read((stop - start) * itemsize)
        if len(data) != (stop - start) * itemsize:
            raise ShortstackError(f"{path} is truncated. Download it again.")
        return np.frombuffer(data, np.uint8)

    return read
