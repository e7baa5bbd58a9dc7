"""The user's files: UTF-8 text and JSON lines, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""What a half is written as, and a whole pair, too."""


def is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def read_utf8(path: Path) -> str:
    """The text of a file. Raises ShortstackError if it cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ShortstackError(
            f"cannot read the text file {path}: {type(error).__name__}. Give UTF-8 .txt or .jsonl."
        ) from None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSONL file; blank lines are skipped.

    Raises ShortstackError, naming the line, for anything that is not JSON, and for text that UTF-8
    cannot hold, which tokenizers refuse.
    """
    # Not splitlines: JSON allows line separators such as U+2028 inside a string.
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if HALF_PAIR.search(line):
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ShortstackError(
                f"{path}, line {number}: it holds half of a surrogate pair, which is no character. "
                "Mend or remove the line."
            ) from None
        except (ValueError, RecursionError):  # numbers of 5,000 digits, 100,000 brackets
            raise ShortstackError(
                f"{path}, line {number}: not JSON. Mend or remove the line."
            ) from None
        yield number, row if isinstance(row, dict) else {}
