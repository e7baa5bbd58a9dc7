"""Perplexity on windows of text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.evaluate import metrics
from shortstack.evaluate.codec import Codec
from shortstack.evaluate.scorer import Scorer
from shortstack.evaluate.sets import Row, SetSpec
from shortstack.progress import OnProgress
from shortstack.rows import is_jsonl, read_rows, read_utf8
from shortstack.text import token_windows

METRICS = ("perplexity",)
WINDOWS = 64
"""Windows of a text where the set sets no limit."""


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


def windows_of(scorer: Scorer, codec: Codec, spec: SetSpec, seed: int) -> list[list[int]]:
    """The windows that a set stands for, no longer than the model reads."""
    length = min(spec.window_tokens, scorer.max_tokens)
    documents = open_documents(spec.path)
    return cut_windows(codec, documents, length, spec.limit or WINDOWS, seed)


def check(path: Path, metric: str) -> None:
    """Raises ShortstackError for a file whose rows are of another kind."""
    open_documents(path)


def score(
    scorer: Scorer, codec: Codec, spec: SetSpec, seed: int, progress: OnProgress
) -> list[Row]:
    windows = windows_of(scorer, codec, spec, seed)
    scored = scorer.nats(windows, progress)
    return [
        {"nats": one.sum_nats, "n_tokens": one.n_tokens, "window": _fingerprint(window)}
        for one, window in zip(scored, windows, strict=True)
    ]


def _fingerprint(window: list[int]) -> str:
    return hashlib.sha256(repr(window).encode()).hexdigest()[:16]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Perplexity with an interval over windows."""
    nats, counts = [row["nats"] for row in rows], [row["n_tokens"] for row in rows]
    found = metrics.perplexity(nats, counts).to_dict()
    return {"n": len(rows), "n_tokens": sum(counts), "perplexity": found}


def compare(original: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Ratio of the perplexities on the same windows, with an interval over windows."""
    if [row["window"] for row in original] != [row["window"] for row in rows]:
        raise ShortstackError(
            "the two models cut the text into other tokens: their perplexities cannot be compared. "
            "Leave --against away."
        )
    counts = [row["n_tokens"] for row in rows]
    # exp of a mean difference is the ratio
    extra = [b["nats"] - a["nats"] for a, b in zip(original, rows, strict=True)]
    return {"ratio": metrics.perplexity(extra, counts).to_dict()}
