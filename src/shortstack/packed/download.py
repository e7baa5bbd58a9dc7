"""A finished file, compressed for the way: any zstd unpacks it, no runtime reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.disk import disk_errors
from shortstack.manifest import partial_of
from shortstack.packed.coders.zstd import compressor

SAMPLE_BYTES = 2**24


def compress_file(source: Path) -> dict[str, Any]:
    """Write SOURCE.zst beside a file; returns its name and both sizes in bytes.

    Codes of few bits pay by Huffman codes alone, plain text and repeats by matches: the better one
    on the middle of the file is taken. A checksum is part of the frame.
    """
    size = source.stat().st_size
    with source.open("rb") as file:
        file.seek(max(0, (size - SAMPLE_BYTES) // 2))
        sample = file.read(SAMPLE_BYTES)
    efforts = ("fast", "matching")
    best = min(efforts, key=lambda effort: len(compressor(effort).compress(sample)))
    target = source.with_name(f"{source.name}.zst")
    partial = partial_of(target)
    try:
        with disk_errors(target), source.open("rb") as file, partial.open("wb") as out:
            compressor(best, checked=True).copy_stream(file, out, size=size)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return {"file": target.name, "zst_bytes": target.stat().st_size, "plain_bytes": size}
