"""The head of a plain safetensors file: which tensors lie where, checked against its length."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shortstack.checkpoint import DTYPE_BYTES
from shortstack.errors import ShortstackError, one_line

SIZES = {**DTYPE_BYTES, "I8": 1}
HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Slot:
    """One tensor: `begin` and `stop` are bytes behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    stop: int


def read_head(file: BinaryIO, where: Path) -> bytes:
    """The length and the header of an open file, as they lie in it."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > HEADER_BYTES:
        raise _damaged(str(where), f"its header is said to have {length} bytes")
    header = file.read(length)
    if len(header) < length:
        raise _damaged(str(where), "it ends inside its header")
    return start + header


def parse_head(head: bytes, where: str) -> list[Slot]:
    """The slots in the order of their bytes. Raises ShortstackError for gaps and overlaps."""
    try:
        table = json.loads(head[8:], object_pairs_hook=unique_keys)
        if int.from_bytes(head[:8], "little") != len(head) - 8:
            raise ValueError("its length is wrong")
        table.pop("__metadata__", None)
        slots = [_slot(name, info) for name, info in table.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(where, f"its header cannot be read ({one_line(str(error), 80)})") from None
    slots.sort(key=lambda slot: (slot.begin, slot.stop))
    at = 0
    for slot in slots:
        if slot.begin != at or slot.stop - slot.begin != math.prod(slot.shape) * SIZES[slot.dtype]:
            raise _damaged(where, f"{slot.name} is not where the tensors before it end")
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
    if info["dtype"] not in SIZES:
        raise ValueError(f"{name} is {info['dtype']}")
    return Slot(name, info["dtype"], shape, begin, stop)


def _damaged(where: str, fact: str) -> ShortstackError:
    return ShortstackError(f"{where} is no whole safetensors file: {fact}. Get it again.")
