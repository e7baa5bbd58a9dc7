"""The user's text, split into disjoint parts by document, and cut into token windows."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.rows import is_jsonl, read_rows, read_utf8

PARTS = ("calibration", "selection", "test")
BLOCK_CHARS = 4000
"""A plain text file has no documents: blocks of about this size stand in for them."""


@dataclass(frozen=True)
class Corpus:
    """Documents in three disjoint parts: score on one, choose on the next, report on the last."""

    source: str
    sha256: str
    calibration: tuple[str, ...]
    selection: tuple[str, ...]
    test: tuple[str, ...]

    def part(self, name: str) -> tuple[str, ...]:
        documents: tuple[str, ...] = getattr(self, name)
        return documents


def open_corpus(source: str | Mapping[str, str]) -> Corpus:
    """Open a text and split it into its parts, or take the parts from three files.

    `source`: a .txt, .md, .jsonl or .jsonl.gz file; `spdx`, the licence texts of that package;
    or a mapping with a file for each part. Documents of one group (a licence family, equal JSONL
    rows) never cross parts. Raises ShortstackError for a missing, empty or unreadable file, and
    for three files that share a document.
    """
    if not isinstance(source, str):
        return _corpus_of_files(source)
    groups = _spdx() if source == "spdx" else _file(Path(source))
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for index, name in enumerate(sorted(groups, key=_shuffled)):
        # Round-robin over hashed groups: half to calibration, a quarter to each other part.
        parts[("calibration", "selection", "calibration", "test")[index % 4]] += groups[name]
    empty = [name for name, documents in parts.items() if not documents]
    if empty:
        raise ShortstackError(
            f"text {source!r} has too few documents to fill the {empty[0]} part. "
            "Give at least four JSONL rows or 16 kB of text."
        )
    return _corpus(source, parts)


def _corpus(source: str, parts: Mapping[str, Sequence[str]]) -> Corpus:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Corpus(source, digest, *(tuple(parts[name]) for name in PARTS))


def _corpus_of_files(source: Mapping[str, str]) -> Corpus:
    groups = {name: _file(Path(source[name])) for name in PARTS}
    for first, second in itertools.combinations(PARTS, 2):
        shared = groups[first].keys() & groups[second].keys()
        if shared:
            raise ShortstackError(
                f"{source[first]} and {source[second]} share {len(shared)} documents, so {second} "
                f"text was seen in {first}. Remove them from one file."
            )
    parts = {name: [d for group in groups[name].values() for d in group] for name in PARTS}
    return _corpus(" ".join(source[name] for name in PARTS), parts)


def token_windows(
    documents: Sequence[str], encode: Callable[[str], list[int]], length: int, count: int
) -> list[list[int]]:
    """Cut at most `count` windows of `length` tokens, one a document first, no window overlapping.

    Where no document is that long, they are joined, a blank line between. Raises ShortstackError
    if all together do not hold a single window.
    """
    windows = _cut(documents, encode, length, count) or _cut(
        ["\n\n".join(documents)], encode, length, count
    )
    if not windows:
        raise ShortstackError(
            f"the text holds no {length} tokens. Give more text or ask for shorter windows."
        )
    return windows[:count]


def _cut(
    documents: Sequence[str], encode: Callable[[str], list[int]], length: int, count: int
) -> list[list[int]]:
    per_document: list[list[list[int]]] = []
    for document in documents:
        # 16 characters a token is far more than any tokenizer needs: bounds the work.
        ids = encode(document[: 16 * length * count])
        cuts = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        if cuts:
            per_document.append(cuts)
        if len(per_document) >= count:
            break
    return [
        cuts[depth]
        for depth in range(max(map(len, per_document), default=0))
        for cuts in per_document
        if depth < len(cuts)
    ]


def _shuffled(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _spdx() -> dict[str, list[str]]:
    """Licence texts, grouped by family (`GPL-3.0-only` and `GPL-2.0` share `gpl`)."""
    spec = importlib.util.find_spec("spdx")
    if spec is None or spec.origin is None:
        raise MissingExtraError("spdx", "demo", "the text 'spdx'")
    groups: dict[str, list[str]] = {}
    data = Path(spec.origin).parent / "data"
    for file in sorted(p for p in data.rglob("*") if p.is_file()):
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        if len(text) > 500:
            groups.setdefault(re.split(r"[-_.\d]", file.stem.lower())[0], []).append(text)
    return groups


def _file(path: Path) -> dict[str, list[str]]:
    if is_jsonl(path):
        documents = [_row_text(path, number, row) for number, row in read_rows(path)]
    else:
        documents = _blocks(read_utf8(path))
    groups: dict[str, list[str]] = {}
    for document in filter(None, documents):
        groups.setdefault(hashlib.sha256(document.encode()).hexdigest(), [document])
    return groups


def _row_text(path: Path, number: int, row: Mapping[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise ShortstackError(
            f"{path}, line {number}: no string field 'text'. Rename the field that holds the text."
        )
    return text.strip()


def _blocks(text: str) -> list[str]:
    """Join paragraphs to blocks of about BLOCK_CHARS."""
    blocks: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= BLOCK_CHARS:
            blocks.append(current)
            current = ""
    return [*blocks, current.strip()] if current.strip() else blocks
