"""Safetensors files, read and written as byte ranges: one tensor's chunk in memory, no torch.

The format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header padded
with spaces, then the tensors' bytes without gaps. Knowing names, types and shapes before the
first byte makes the written size exact in advance and the memory needed constant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from shortstack.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from shortstack.errors import ShortstackError
from shortstack.safetensors_header import Head, open_head

MAX_SHARD_BYTES = 2**30
CHUNK_BYTES = 2**24
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """Which tensors lie in which shard, in file order, and the exact bytes on disk."""

    shards: tuple[tuple[str, dict[str, TensorInfo]], ...]
    weight_bytes: int

    @property
    def index(self) -> str | None:
        """Text of the shard index; None where a single shard needs none."""
        if len(self.shards) == 1:
            return None
        shard_of = {name: file for file, tensors in self.shards for name in tensors}
        content = {
            "metadata": {"total_size": self.weight_bytes},
            "weight_map": dict(sorted(shard_of.items())),
        }
        return json.dumps(content, indent=2) + "\n"

    @property
    def n_bytes(self) -> int:
        headers = sum(len(_header(tensors)) for _, tensors in self.shards)
        return headers + self.weight_bytes + len((self.index or "").encode())


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_bytes: int = MAX_SHARD_BYTES
) -> Layout:
    """Split (name, dtype, shape) in the given order into shards of at most `max_bytes`.

    A tensor larger than that gets a shard of its own.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    used = total = 0
    for name, dtype, shape in tensors:
        info = TensorInfo("", dtype, shape)
        if groups[-1] and used + info.n_bytes > max_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = info
        used += info.n_bytes
        total += info.n_bytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    shards = []
    for file, group in zip(names, groups, strict=True):
        # Wide types first keeps every tensor aligned to its own width.
        ordered = sorted(group.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype])
        shards.append((file, {n: TensorInfo(file, i.dtype, i.shape) for n, i in ordered}))
    return Layout(tuple(shards), total)


class ShardWriter:
    """Write the tensors of a layout in its order; anything else is a bug and said so."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._todo = [(file, name, i) for file, part in layout.shards for name, i in part.items()]
        self._next = 0
        self._file: BinaryIO | None = None
        self._open = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._file:
            self._file.close()
        if kind is None:
            if self._next != len(self._todo):
                raise ValueError(f"ended before tensor {self._todo[self._next][1]}")
            if self._layout.index:
                (self._folder / INDEX).write_text(self._layout.index, encoding="utf-8")

    @property
    def names(self) -> list[str]:
        """Tensor names in the order in which `write` expects them."""
        return [name for _, name, _ in self._todo]

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Append one tensor, given as byte chunks."""
        file, expected, info = self._todo[self._next]
        if name != expected:
            raise ValueError(f"expected tensor {expected}, got {name}")
        if file != self._open:
            self._start(file)
        assert self._file is not None
        n_bytes = sum(self._file.write(chunk) for chunk in chunks)
        if n_bytes != info.n_bytes:
            raise ValueError(f"{name}: expected {info.n_bytes} bytes, got {n_bytes}")
        self._next += 1

    def _start(self, file: str) -> None:
        if self._file:
            self._file.close()
        self._file, self._open = (self._folder / file).open("wb"), file
        self._file.write(_header(dict(self._layout.shards)[file]))


class ShardReader:
    """Byte ranges of a checkpoint's tensors; keeps one shard open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._file: BinaryIO | None = None
        self._open, self._head = "", Head(0, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file:
            self._file.close()

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield a tensor's bytes, little endian, row-major, at most `size` at a time."""
        info = self._checkpoint.tensors[name]
        if info.file != self._open:
            self._start(info.file)
        assert self._file is not None
        slot = self._head.slots[name]
        self._file.seek(self._head.at(name))
        left = slot.stop - slot.begin
        while left:
            chunk = self._file.read(min(size, left))
            if not chunk:
                raise ShortstackError(
                    f"{self._checkpoint.path / info.file} ends inside {name}. Download it again."
                )
            left -= len(chunk)
            yield chunk

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a tensor; the caller keeps the range small."""
        info = self._checkpoint.tensors[name]
        if info.file != self._open:
            self._start(info.file)
        assert self._file is not None
        self._file.seek(self._head.at(name) + start)
        return self._file.read(stop - start)

    def _start(self, file: str) -> None:
        if self._file:
            self._file.close()
        path = self._checkpoint.path / file
        self._head = open_head(path, "Download it again.")
        self._file, self._open = path.open("rb"), file


def _header(tensors: dict[str, TensorInfo]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        content[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.n_bytes],
        }
        offset += info.n_bytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
