"""A packed model back into the Hugging Face folder it was made of, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.packed.coders import Bytes
from shortstack.packed.header import Entry, damaged
from shortstack.packed.read import Packed, plain_chunks, read_whole, streams
from shortstack.progress import OnProgress, silent
from shortstack.row_codes import CODES, STEPS
from shortstack.safetensors_header import Slot, parse_head


def unpack_folder(packed: Packed, out: Path, progress: OnProgress = silent) -> Checkpoint:
    """Write the files into the existing folder `out`, which the caller stages.

    Raises ShortstackError for a damaged file, named with the tensor, and for too little disk.
    """
    heads, plan = check_complete(packed)
    require_space(out, disk_bytes(packed, plan))
    total, done = sum(map(len, plan.values())), 0
    with disk_errors(out):
        for entry in packed.contents.entries:
            if entry.kind == "file":
                (out / entry.name).write_bytes(read_whole(packed, entry))
        for name, slots in plan.items():
            with (out / name).open("wb") as file:
                file.write(heads[name])
                for slot in slots:
                    for chunk in _slot_chunks(packed, name, slot):
                        file.write(chunk.data)
                    done += 1
                    progress(done, total)
    return Checkpoint.open(out)


def check_complete(packed: Packed) -> tuple[dict[str, bytes], dict[str, list[Slot]]]:
    """Heads and tensors of all shards, by their names; every tensor lies in one of them."""
    heads = {e.name: read_whole(packed, e) for e in packed.contents.entries if e.kind == "shard"}
    plan = {name: plan_shard(packed, name, head) for name, head in heads.items()}
    _check_placed(packed, plan)
    return heads, plan


def disk_bytes(packed: Packed, plan: dict[str, list[Slot]]) -> int:
    files = sum(e.raw_bytes for e in packed.contents.entries if not e.is_tensor)
    return files + sum(slot.stop - slot.begin for slots in plan.values() for slot in slots)


def plan_shard(packed: Packed, name: str, head: bytes) -> list[Slot]:
    """The tensors of a shard, each held by an entry of the same type and shape."""
    where, tensors = f"{packed.path}: {name}", packed.contents.tensors
    slots = parse_head(head, where)
    for slot in slots:
        entry = tensors.get(_stem(slot.name) if name == SIDECAR else slot.name)
        if entry is None or (slot.dtype, slot.shape) not in _forms(entry, name, slot.name):
            raise damaged(where, f"no entry holds its tensor {slot.name}")
    return slots


def _forms(entry: Entry, shard: str, name: str) -> list[tuple[str, tuple[int, ...]]]:
    if shard != SIDECAR:
        return [(entry.dtype, entry.shape)]
    if entry.kind != "row-codes":
        return []
    if name == entry.name + CODES:
        return [("I8", entry.shape)]
    return [("F16", entry.shape[:1])] if name == entry.name + STEPS else []


def _stem(name: str) -> str:
    return name.removesuffix(CODES) if name.endswith(CODES) else name.removesuffix(STEPS)


def _check_placed(packed: Packed, plan: dict[str, list[Slot]]) -> None:
    """Every tensor lies in one shard, and every pair of row codes in the sidecar."""
    placed = [slot.name for name, slots in plan.items() if name != SIDECAR for slot in slots]
    tensors = packed.contents.tensors
    if sorted(placed) != sorted(tensors):
        raise damaged(str(packed.path), "its shards do not hold each of its tensors once")
    coded = {n + end for n, e in tensors.items() if e.kind == "row-codes" for end in (CODES, STEPS)}
    if coded != {slot.name for slot in plan.get(SIDECAR, [])}:
        raise damaged(str(packed.path), f"{SIDECAR} does not hold each of its codes once")


def _slot_chunks(packed: Packed, shard: str, slot: Slot) -> Iterator[Bytes]:
    tensors = packed.contents.tensors
    if shard != SIDECAR:
        yield from plain_chunks(packed, tensors[slot.name])
        return
    # its blob was checked when the weights were written
    only = (0,) if slot.name.endswith(CODES) else (1,)
    for (stream,) in streams(packed, tensors[_stem(slot.name)], only):
        yield stream
