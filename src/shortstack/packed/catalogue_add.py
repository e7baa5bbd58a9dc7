"""Models into a catalogue: one at a time, each stored whole or not at all, damage mended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.errors import ShortstackError
from shortstack.manifest import partial_of, write_text
from shortstack.packed import pack
from shortstack.packed.catalogue import BLOBS, DEVICES, NAME, OURS, Variant, variants
from shortstack.packed.choose import Tries
from shortstack.packed.coders import Bytes
from shortstack.packed.header import CHUNK_BYTES, Contents, Entry
from shortstack.packed.prove import prove
from shortstack.packed.sources import Source, sources
from shortstack.progress import OnProgress, silent

Key = tuple[Any, ...]
LEFTOVERS = (".*.trial", ".*.partial", f"{BLOBS}/.*.partial")


@dataclass
class Cost:
    """What a variant takes, bytes: plain, coded, and of the latter what no earlier variant had."""

    name: str
    plain_bytes: int
    coded_bytes: int
    new_bytes: int = 0
    n_tensors: int = 0
    n_shared: int = 0
    packings: list[pack.Packing] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "packings"}


def check_name(folder: Path, name: str) -> None:
    """Raise ShortstackError for what cannot name a variant of `folder` on every disk. A name that
    is there already can: adding its model again is how damage is mended."""
    there = variants(folder)
    if name in there:
        return
    if not NAME.fullmatch(name):
        raise ShortstackError(f"{name!r} cannot name a variant. Use letters, digits, . _ and -.")
    low = name.lower()
    if low in OURS or low.partition(".")[0] in DEVICES:
        raise ShortstackError(
            f"{name!r} cannot name a variant: "
            f"{'the catalogue itself' if low in OURS else 'Windows'} uses it. Choose another name."
        )
    alike = [other for other in there if other.lower() == low]
    if alike:
        raise ShortstackError(
            f"{folder} has a variant {alike[0]}: {name} differs by case alone, which not every "
            "disk tells apart. Name this one otherwise."
        )


def check_free(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Raise ShortstackError for a name that another model has. Reads the model, codes nothing; a
    variant that is damaged has no model any more."""
    check_name(folder, name)
    held = _readable(folder, [name])
    if name not in held:
        return
    entries, todo = held[name].contents.entries, list(sources(checkpoint))
    if [entry.blob for entry in entries] != [source.blob for source in todo] or any(
        _entry_key(entry) != _key(source) for entry, source in zip(entries, todo, strict=True)
    ):
        raise ShortstackError(
            f"{folder / name}.json is another model already. Name this one otherwise."
        )


def damaged_variants(folder: Path) -> list[str]:
    """Names of the variants whose document cannot be read."""
    names = variants(folder)
    return sorted(set(names) - set(_readable(folder, names)))


def add(
    folder: Path, name: str, checkpoint: Checkpoint, allowed: Tries, progress: OnProgress = silent
) -> Cost:
    """Store a model under a name, proven bit for bit, or not at all; blobs that are there already
    are shared. What is damaged of a model that is added again is mended, in every variant.

    The caller sees to it that nobody else writes (`folder_lock.alone_in`). Raises ShortstackError
    for a name that is taken by another model.
    """
    check_free(folder, name, checkpoint)
    clean(folder)
    try:
        with disk_errors(folder):
            return _add(folder, name, checkpoint, allowed, progress)
    finally:
        clean(folder)


def clean(folder: Path) -> None:
    """Remove what a run that was stopped left: half-written files, and blobs that no variant has.
    The latter stay while a variant cannot be read: they may be its."""
    for pattern in LEFTOVERS:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
    names = variants(folder)
    held = _readable(folder, names)
    if len(held) < len(names):
        return
    used = {entry.coded_sha256 for one in held.values() for entry in one.contents.entries}
    for blob in (folder / BLOBS).iterdir():
        if blob.name not in used:
            blob.unlink()


def _add(
    folder: Path, name: str, checkpoint: Checkpoint, allowed: Tries, progress: OnProgress
) -> Cost:
    known = _known(folder)
    todo = list(sources(checkpoint))
    entries, mended, cost = [], dict[Key, Entry](), Cost(name, 0, 0)
    for done, source in enumerate(todo, 1):
        key = _key(source)
        entry = known.get(key)
        whole = entry is not None and _holds(folder / BLOBS / entry.coded_sha256, entry)
        cost.n_shared += whole and source.is_tensor
        if entry is None or not whole:
            made = _add_blob(folder, source, allowed, cost)
            if entry is not None:
                mended[key] = made.entry
            known[key] = entry = made.entry
            cost.packings.append(made)
        entries.append(entry.model_copy(update={"name": source.name}))
        progress(done, len(todo))
    contents = pack.contents(entries)
    cost.plain_bytes, cost.n_tensors = contents.plain_bytes, len(contents.tensors)
    cost.coded_bytes = sum(entry.coded_bytes for entry in entries)
    _write_proven(folder, name, contents, checkpoint)
    _mend_others(folder, mended)
    return cost


def _mend_others(folder: Path, mended: dict[Key, Entry]) -> None:
    """Point every variant to blobs that were coded anew, maybe by another version of a coder."""
    for name, held in _readable(folder, variants(folder)).items():
        entries = [
            mended.get(_entry_key(entry), entry).model_copy(update={"name": entry.name})
            for entry in held.contents.entries
        ]
        if entries != list(held.contents.entries):
            write_text(folder / f"{name}.json", _document(pack.contents(entries)))


def _document(contents: Contents) -> str:
    text = contents.model_dump_json()
    held = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "packed": text}
    return json.dumps(held) + "\n"


def _write_proven(folder: Path, name: str, contents: Contents, checkpoint: Checkpoint) -> None:
    trial = folder / f".{name}.trial"
    try:
        write_text(trial, _document(contents))
        prove(Variant(trial), checkpoint)
        os.replace(trial, folder / f"{name}.json")
    finally:
        trial.unlink(missing_ok=True)


def _readable(folder: Path, names: Iterable[str]) -> dict[str, Variant]:
    """The variants of `names` that are there and whole, blobs aside."""
    found = {}
    for name in names:
        try:
            found[name] = Variant(folder / f"{name}.json")
        except (ShortstackError, FileNotFoundError):
            continue
    return found


def _known(folder: Path) -> dict[Key, Entry]:
    """Every entry of every variant that can be read, by what it was made of."""
    held = _readable(folder, variants(folder)).values()
    return {_entry_key(entry): entry for one in held for entry in one.contents.entries}


def _entry_key(entry: Entry) -> Key:
    form = entry.kind if entry.kind == "row-codes" or not entry.is_tensor else "tensor"
    return form, entry.dtype, entry.shape, entry.raw_sha256


def _key(source: Source) -> Key:
    """What makes two sources the same: kind, type, shape and content, no matter the name."""
    digests = [hashlib.sha256() for _ in range(1 if source.codes is None else 2)]
    step = pack.chunk_of(source)
    for start in range(0, source.n_elements, step):
        stop = min(source.n_elements, start + step)
        parts: tuple[Bytes, ...] = (
            (source.read(start, stop),) if source.codes is None else source.read_codes(start, stop)
        )
        for digest, part in zip(digests, parts, strict=True):
            digest.update(part.data)
    form = source.kind if source.codes is None else "row-codes"
    return form, source.dtype, source.shape, tuple(digest.hexdigest() for digest in digests)


class _BlobSink:
    """Appends to a file in the catalogue that gets its name when its checksum is known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def begin(self) -> None:
        self._file.seek(0)
        self._file.truncate()

    def append(self, data: bytes) -> int:
        return self._file.write(data)


def _add_blob(folder: Path, source: Source, allowed: Tries, cost: Cost) -> pack.Packing:
    partial = partial_of(folder / BLOBS / f"new-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            made = pack.pack_one(source, _BlobSink(file), allowed)
            file.flush()
            os.fsync(file.fileno())
        target = folder / BLOBS / made.entry.coded_sha256
        if not _holds(target, made.entry):
            os.replace(partial, target)
            cost.new_bytes += made.entry.coded_bytes
    finally:
        partial.unlink(missing_ok=True)
    return made


def _holds(file: Path, entry: Entry) -> bool:
    """Whether the blob of an entry is there and whole."""
    if not file.is_file() or file.stat().st_size != entry.coded_bytes:
        return False
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest() == entry.coded_sha256
