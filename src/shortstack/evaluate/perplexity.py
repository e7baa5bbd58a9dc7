"""Perplexity on windows of text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from shortstack.errors import ShortstackError
from shortstack.evaluate.codec import Codec
from shortstack.rows import is_jsonl, read_rows, read_utf8
from shortstack.text import token_windows


def open_documents(path: Path) -> tuple[str, ...]:
    """The documents of a .txt, .md or .jsonl file (field `text`), each once, as they come.

    Raises ShortstackError for a file without text and for a row without a field `text`.
    """
    documents = []
    if is_jsonl(path):
        for number, row in read_rows(path):
            text = row.get("text")
            if not isinstance(text, str):
                raise ShortstackError(
                    f"{path}, line {number}: no string field 'text'. "
                    "Rename the field that holds the text."
                )
            documents.append(text.strip())
    else:
        documents.append(read_utf8(path).strip())
    found = tuple(dict.fromkeys(filter(None, documents)))
    if not found:
        raise ShortstackError(f"{path} holds no text. Give documents.")
    return found


def cut_windows(
    codec: Codec, documents: Sequence[str], length: int, count: int, seed: int = 0
) -> list[list[int]]:
    """At most `count` windows of `length` tokens, over as many documents as there are.

    Documents are taken in an order that `seed` decides. Raises ShortstackError where all
    together do not hold one window.
    """

    def shuffled(document: str) -> str:
        return hashlib.sha256(f"{seed} {document}".encode()).hexdigest()

    order = sorted(documents, key=shuffled)
    cut = token_windows(order, codec.encode, length - len(codec.prefix), count)
    return [[*codec.prefix, *window] for window in cut]
