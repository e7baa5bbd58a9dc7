"""Runtimes: open an artifact, run tokens. One file and one table line each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from shortstack.errors import unknown
from shortstack.runtimes import capabilities
from shortstack.session import Session

RUNTIMES: dict[str, tuple[str, str]] = {
    "llama.cpp": ("gguf", "shortstack.runtimes.llama_cpp"),
    "onnxruntime": ("onnx", "shortstack.runtimes.ort"),
    "onnxruntime-genai": ("onnx", "shortstack.runtimes.ort_genai"),
    "pytorch": ("checkpoint", "shortstack.runtimes.pytorch"),
    "pytorch-packed": ("packed", "shortstack.runtimes.pytorch_packed"),
}
"""Name -> (format it opens, module with `open_session`). The first of a format is its default."""


def runtimes_for(fmt: str, wanted: Sequence[str] = ()) -> list[str]:
    """Names of the runtimes that open `fmt`, default first; only those `wanted`, if any are.

    Raises ShortstackError for a wanted name that no table line has.
    """
    for name in wanted:
        if name not in RUNTIMES:
            raise unknown("runtime", name, RUNTIMES)
    opens = [name for name, (opened, _) in RUNTIMES.items() if opened == fmt]
    return [name for name in opens if not wanted or name in wanted]


def open_session(
    path: Path,
    runtime: str,
    *,
    threads: int,
    context_tokens: int,
    device: str = "cpu",
    batch: int = 1,
    options: Mapping[str, str] | None = None,
) -> Session:
    """Open a file or folder for `batch` sequences of at most `context_tokens` tokens each.

    `options`: the runtime's own, as `capabilities.CAPABILITIES` lists them. Raises ShortstackError
    for an unknown runtime, for what it does not offer and for a file that it cannot open,
    MissingExtraError where its package is not installed.
    """
    try:
        _, module = RUNTIMES[runtime]
    except KeyError:
        raise unknown("runtime", runtime, RUNTIMES) from None
    capabilities.check(runtime, device, batch, options or {})
    capabilities.check_together(runtime, device, options or {})
    session: Session = importlib.import_module(module).open_session(
        path,
        threads=threads,
        context_tokens=context_tokens,
        device=device,
        batch=batch,
        **(options or {}),
    )
    return session
