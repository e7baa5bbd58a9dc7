"""Quantize a GGUF file with libllama, in a child: its crash is an error, Ctrl-C is immediate."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack import child, libllama
from shortstack.disk import disk_full
from shortstack.errors import ShortstackError

TIMEOUT_S = 24 * 3600.0
BUFFER_BYTES = 512 * 2**20
"""Rows that libllama may hold at once; its own default is 8 GiB."""


def quantize(source: Path, target: Path, request: Mapping[str, Any]) -> list[str]:
    """Write `target`; return notes on tensors whose rows do not fit the wanted type."""
    answer = child.call(
        "shortstack.export.gguf_quantize:quantize_here",
        {**request, "source": str(source), "target": str(target)},
        timeout_s=TIMEOUT_S,
        what=f"quantizing {target.name} with libllama",
    )
    notes: list[str] = answer["notes"]
    return notes


def quantize_here(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: the call itself."""
    lib = libllama.libllama()
    import gguf

    params = lib.llama_model_quantize_default_params()
    params.ftype = request["file_type"]
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    params.max_buf_size = BUFFER_BYTES
    if request["head"]:
        params.output_tensor_type = gguf.GGMLQuantizationType[request["head"]]
    if request["embedding"]:
        params.token_embedding_type = gguf.GGMLQuantizationType[request["embedding"]]
    libllama.clear_log()
    target = Path(request["target"])
    code = lib.llama_model_quantize(request["source"].encode(), request["target"].encode(), params)
    if code:
        words = libllama.last_words()
        if "iostream error" in words or shutil.disk_usage(target.parent).free < 2**20:
            raise disk_full(target)
        raise ShortstackError(
            f"libllama cannot quantize to {target.name}: {words}. Try another precision."
        )
    return {"notes": fallback_notes(libllama.log())}


def fallback_notes(log: list[str]) -> list[str]:
    """What libllama says when rows are no multiple of 256: one note, or none."""
    for line in log:
        found = re.search(r"(\d+) of (\d+) tensor\(s\) required fallback", line)
        if found:
            return [
                f"{found[1]} of {found[2]} tensors have rows that are no multiple of 256 and fell "
                "back to a larger type than asked for"
            ]
    return []
