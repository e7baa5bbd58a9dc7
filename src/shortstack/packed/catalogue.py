"""A catalogue of cuts: variants of one model in a folder, each equal tensor stored once.

catalogue.json      marks the folder
NAME.json           a variant: the document of a packed file's header, and its SHA-256
blobs/SHA256        a blob, by the checksum of its bytes
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.errors import ShortstackError, unknown
from shortstack.manifest import partial_of, write_text
from shortstack.packed import pack
from shortstack.packed.choose import Tries
from shortstack.packed.coders import Bytes
from shortstack.packed.header import (
    CHUNK_BYTES,
    HEADER_BYTES,
    Contents,
    Entry,
    check_count,
    damaged,
    parse_contents,
)
from shortstack.packed.prove import prove
from shortstack.packed.sources import Source, sources
from shortstack.progress import OnProgress, silent

MARK = "catalogue.json"
BLOBS = "blobs"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Key = tuple[Any, ...]


class Variant:
    """One model of a catalogue, read as a packed file is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size > HEADER_BYTES:
            raise damaged(str(path), "it is too large for a variant")
        try:
            whole = path.read_text(encoding="utf-8")
            check_count(whole.count(","), str(path))
            held = json.loads(whole)
            text, self.sha256 = held["packed"], held["sha256"]
            right = hashlib.sha256(text.encode()).hexdigest() == self.sha256
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged(str(path), "it is no variant of a catalogue") from None
        if not right:
            raise damaged(str(path), "its checksum is wrong")
        self.contents: Contents = parse_contents(text, str(path))

    @contextmanager
    def open_blob(self, entry: Entry) -> Iterator[BinaryIO]:
        """The file of an entry's blob. Raises ShortstackError for one that is gone."""
        file = self.path.parent / BLOBS / entry.coded_sha256
        if not file.is_file() or file.stat().st_size != entry.coded_bytes:
            raise damaged(str(self.path), f"the blob of {entry.name} is missing or cut short")
        with file.open("rb") as stream:
            yield stream


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


def is_catalogue(folder: Path) -> bool:
    return (folder / MARK).is_file()


def open_catalogue(folder: Path) -> None:
    """Mark an empty or missing folder. Raises ShortstackError for one that holds anything else."""
    if is_catalogue(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ShortstackError(f"{folder} is no catalogue and not empty. Choose another output.")
    (folder / BLOBS).mkdir(parents=True)
    write_text(folder / MARK, json.dumps({"tool": pack.TOOL, "catalogue": 1}) + "\n")


def variants(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.json") if file.name != MARK)


def variant(folder: Path, name: str | None) -> Path:
    """The file of a variant. Raises ShortstackError, with the known ones, for another name."""
    known = variants(folder)
    if name is None and len(known) == 1:
        return folder / f"{known[0]}.json"
    if name not in known:
        raise unknown(f"variant of {folder}", name or "", known)
    return folder / f"{name}.json"


def add(
    folder: Path, name: str, checkpoint: Checkpoint, allowed: Tries, progress: OnProgress = silent
) -> Cost:
    """Store a model under a name, proven bit for bit, or not at all; blobs that are there already
    are shared, those of a failure stay for the next try.

    Raises ShortstackError for a name that is taken by another model.
    """
    if not NAME.fullmatch(name) or f"{name}.json" == MARK:
        raise ShortstackError(f"{name!r} cannot name a variant. Use letters, digits, . _ and -.")
    known = _known(folder)
    todo = list(sources(checkpoint))
    entries, cost = [], Cost(name, 0, 0)
    with disk_errors(folder):
        for done, source in enumerate(todo, 1):
            entry = known.get(_key(source))
            cost.n_shared += entry is not None and source.is_tensor
            if entry is None:
                made = _add_blob(folder, source, allowed, cost)
                known[_key(source)] = entry = made.entry
                cost.packings.append(made)
            entries.append(entry.model_copy(update={"name": source.name}))
            progress(done, len(todo))
    contents = pack.contents(entries)
    cost.plain_bytes, cost.n_tensors = contents.plain_bytes, len(contents.tensors)
    cost.coded_bytes = sum(entry.coded_bytes for entry in entries)
    _write_variant(folder, name, contents, checkpoint)
    return cost


def _write_variant(folder: Path, name: str, contents: Contents, checkpoint: Checkpoint) -> None:
    text = contents.model_dump_json()
    held = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "packed": text}
    target, trial = folder / f"{name}.json", folder / f".{name}.trial"
    if target.exists() and Variant(target).sha256 != held["sha256"]:
        raise ShortstackError(f"{target} is another model already. Name this one otherwise.")
    try:
        write_text(trial, json.dumps(held) + "\n")
        prove(Variant(trial), checkpoint)
        os.replace(trial, target)
    finally:
        trial.unlink(missing_ok=True)


def _known(folder: Path) -> dict[Key, Entry]:
    """Every entry of every variant, by what it was made of."""
    found: dict[Key, Entry] = {}
    for name in variants(folder):
        for entry in Variant(folder / f"{name}.json").contents.entries:
            form = entry.kind if entry.kind == "row-codes" or not entry.is_tensor else "tensor"
            found[(form, entry.dtype, entry.shape, entry.raw_sha256)] = entry
    return found


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
    partial = partial_of(folder / BLOBS / "new")
    try:
        with partial.open("wb") as file:
            made = pack.pack_one(source, _BlobSink(file), allowed)
            file.flush()
            os.fsync(file.fileno())
        target = folder / BLOBS / made.entry.coded_sha256
        if not _holds(target, made.entry.coded_sha256):
            os.replace(partial, target)
            cost.new_bytes += made.entry.coded_bytes
    finally:
        partial.unlink(missing_ok=True)
    return made


def _holds(file: Path, sha256: str) -> bool:
    """Whether a blob of an earlier try is whole."""
    if not file.is_file():
        return False
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest() == sha256
