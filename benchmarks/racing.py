"""Decode several artifacts in turn, every run in a process of its own: what benchmarks share."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from shortstack import child
from shortstack.checkpoint import Checkpoint
from shortstack.runtimes import open_session
from shortstack.text import open_corpus, token_windows

ROOT = Path(__file__).parents[1]


def decode_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: seconds of each of `decode` tokens after a prompt."""
    tokens: list[int] = request["tokens"]
    prompt, spent = len(tokens) - request["decode"], []
    path, runtime, threads = Path(request["path"]), request["runtime"], request["threads"]
    with open_session(path, runtime, threads=threads, context_tokens=len(tokens)) as session:
        session.prefill(tokens[:prompt])
        for token in tokens[prompt:]:
            begin = time.perf_counter()
            session.decode(token)
            spent.append(time.perf_counter() - begin)
    return {"tpot_s": statistics.median(spent)}


def race(
    folders: dict[str, Path],
    tokens: list[int],
    decode: int,
    repeats: int,
    runtime: str = "onnxruntime",
) -> dict[str, list[float]]:
    """Rounds of all, the order turned round every time."""
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for index in range(repeats):
        for name in list(folders)[:: 1 if index % 2 else -1]:
            request = {
                "path": str(folders[name]),
                "tokens": tokens,
                "decode": decode,
                "runtime": runtime,
                "threads": os.cpu_count(),
            }
            answer = child.call(
                "benchmarks.racing:decode_here",
                request,
                timeout_s=600,
                what=f"decoding with {name}",
                env={"PYTHONPATH": str(ROOT)},
            )
            seconds[name].append(answer["tpot_s"])
    return seconds


def windows(
    checkpoint: Checkpoint, text: str, length: int, count: int, part: str = "test"
) -> list[list[int]]:
    """Token windows of a part of a text: calibration, selection or test."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))

    def encode(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False).ids)

    documents = getattr(open_corpus(text), part)
    return [list(window) for window in token_windows(documents, encode, length, count)]
