"""The head of a safetensors file: which tensors lie where, checked against the file's length."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shortstack.errors import ShortstackError, one_line

DTYPE_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""Every type that safetensors names."""

HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""

REMEDY = "Get it again."


@dataclass(frozen=True)
class Slot:
    """One tensor: `begin` and `stop` are bytes behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    stop: int


@dataclass(frozen=True)
class Head:
    """`slots` by their names; `n_bytes`, of length and JSON, is where the tensors' bytes begin."""

    n_bytes: int
    slots: dict[str, Slot]

    def at(self, name: str) -> int:
        """Where a tensor begins in the file."""
        return self.n_bytes + self.slots[name].begin


def open_head(path: Path, remedy: str = REMEDY) -> Head:
    """Read and check the head of a file.

    Raises ShortstackError, which ends with `remedy`, for what is no whole safetensors file; OSError
    for one that cannot be read.
    """
    with path.open("rb") as file:
        head = read_head(file, path, remedy)
    slots = parse_head(head, str(path), remedy)
    size, end = path.stat().st_size, len(head) + max((slot.stop for slot in slots), default=0)
    if size != end:
        raise _damaged(str(path), f"{size} bytes, its header needs {end}", remedy)
    return Head(len(head), {slot.name: slot for slot in slots})


def read_head(file: BinaryIO, where: Path, remedy: str = REMEDY) -> bytes:
    """The length and the header of an open file, as they lie in it."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > HEADER_BYTES:
        raise _damaged(str(where), f"its header is said to have {length} bytes", remedy)
    header = file.read(length)
    if len(header) < length:
        raise _damaged(str(where), "it ends inside its header", remedy)
    return start + header


def parse_head(head: bytes, where: str, remedy: str = REMEDY) -> list[Slot]:
    """The slots in the order of their bytes. Raises ShortstackError for gaps and overlaps."""
    try:
        table = json.loads(head[8:], object_pairs_hook=unique_keys)
        if int.from_bytes(head[:8], "little") != len(head) - 8:
            raise ValueError("its length is wrong")
        table.pop("__metadata__", None)
        slots = [_slot(name, info) for name, info in table.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fact = f"its header cannot be read: {one_line(str(error), 80)}"
        raise _damaged(where, fact, remedy) from None
    slots.sort(key=lambda slot: (slot.begin, slot.stop))
    at = 0
    for slot in slots:
        n_bits = math.prod(slot.shape) * DTYPE_BITS[slot.dtype]
        if slot.begin != at or 8 * (slot.stop - slot.begin) != n_bits:
            raise _damaged(where, f"{slot.name} is not where the tensors before it end", remedy)
        at = slot.stop
    return slots


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: readers disagree on which of two equal keys counts. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _slot(name: str, info: dict[str, Any]) -> Slot:
    begin, stop = info["data_offsets"]
    shape = tuple(info["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
        raise ValueError(f"{name} has no whole sizes")
    if info["dtype"] not in DTYPE_BITS:
        raise ValueError(f"{name} is {info['dtype']}")
    return Slot(name, info["dtype"], shape, begin, stop)


def _damaged(where: str, fact: str, remedy: str) -> ShortstackError:
    return ShortstackError(f"{where} is truncated or not safetensors ({fact}). {remedy}")
