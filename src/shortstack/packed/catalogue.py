"""A catalogue of cuts: variants of one model in a folder, each equal tensor stored once.
`catalogue_add.py` fills it.

catalogue.json      marks the folder
NAME.json           a variant: the document of a packed file's header, and its SHA-256
blobs/SHA256        a blob, by the checksum of its bytes
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shortstack.errors import ShortstackError, unknown
from shortstack.manifest import MANIFEST, write_text
from shortstack.packed.header import (
    HEADER_BYTES,
    Contents,
    Entry,
    check_count,
    damaged,
    parse_contents,
)
from shortstack.packed.pack import TOOL

MARK = "catalogue.json"
BLOBS = "blobs"
MEND = "Add the model again under its name: that mends it."
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
OURS = frozenset({Path(MARK).stem, Path(MANIFEST).stem, BLOBS})
"""Names of files that a catalogue, or any output of a command, has of its own."""
DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10))}
)
"""No file of Windows may have such a name, whatever follows behind a dot."""


class Variant:
    """One model of a catalogue, read as a packed file is."""

    def __init__(self, path: Path) -> None:
        self.path, self.remedy = path, MEND
        if path.stat().st_size > HEADER_BYTES:
            raise damaged(str(path), "it is too large for a variant", MEND)
        try:
            whole = path.read_text(encoding="utf-8")
            check_count(whole.count(","), str(path), MEND)
            held = json.loads(whole)
            text, self.sha256 = held["packed"], held["sha256"]
            right = hashlib.sha256(text.encode()).hexdigest() == self.sha256
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged(str(path), "it is no variant of a catalogue", MEND) from None
        if not right:
            raise damaged(str(path), "its checksum is wrong", MEND)
        self.contents: Contents = parse_contents(text, str(path), MEND)

    @contextmanager
    def open_blob(self, entry: Entry) -> Iterator[BinaryIO]:
        """The file of an entry's blob. Raises ShortstackError for one that is gone."""
        file = self.path.parent / BLOBS / entry.coded_sha256
        if not file.is_file() or file.stat().st_size != entry.coded_bytes:
            fact = f"the blob of {entry.name} is missing or cut short"
            raise damaged(str(self.path), fact, MEND)
        with file.open("rb") as stream:
            yield stream


def is_catalogue(folder: Path) -> bool:
    return (folder / MARK).is_file()


def open_catalogue(folder: Path) -> None:
    """Mark an empty or missing folder. Raises ShortstackError for one that holds anything else."""
    if is_catalogue(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ShortstackError(f"{folder} is no catalogue and not empty. Choose another output.")
    (folder / BLOBS).mkdir(parents=True, exist_ok=True)
    write_text(folder / MARK, json.dumps({"tool": TOOL, "catalogue": 1}) + "\n")


def variants(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.json") if file.name != MARK)


def variant(folder: Path, name: str | None) -> Path:
    """The file of a variant. Raises ShortstackError, with the known ones, for another name."""
    known = variants(folder)
    if name is None and len(known) == 1:
        return folder / f"{known[0]}.json"
    if name is None and known:
        raise ShortstackError(
            f"{folder} is a catalogue of {len(known)} models: {', '.join(known)}. Name one: "
            f"--variant {known[0]}"
        )
    if name not in known:
        raise unknown(f"variant of {folder}", name or "", known)
    return folder / f"{name}.json"
