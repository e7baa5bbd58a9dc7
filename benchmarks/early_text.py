"""Text of the data sets as tokens: windows to read, prompts to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.sets import file_of

from shortstack.evaluate.codec import FolderCodec, with_prefix
from shortstack.rows import read_rows

PROMPT_TOKENS, WINDOW_TOKENS = 32, 128


def texts(data: Path, name: str, split: str) -> list[str]:
    rows = read_rows(file_of(data, name, split))
    return [str(row["text"]) for _, row in rows if str(row.get("text", "")).strip()]


def windows(
    codec: FolderCodec, documents: Sequence[str], length: int, most: int
) -> list[list[int]]:
    """Windows of one length, the same number from the beginning of each document first."""
    per_document = [with_prefix(codec, text) for text in documents]
    found: list[list[int]] = []
    for start in range(0, max(map(len, per_document)), length):
        for ids in per_document:
            if len(ids) >= start + length and len(found) < most:
                found.append(ids[start : start + length])
    return found
