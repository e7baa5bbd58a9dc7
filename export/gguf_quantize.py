"""Quantize a GGUF file with libllama, in a child: its crash is an error, Ctrl-C is immediate."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack import child, libllama
from shortstack.disk import disk_full
from shortstack.errors import ShortstackError
from shortstack.export.gguf_types import PRECISIONS, TYPES

TIMEOUT_S = 24 * 3600.0
BUFFER_BYTES = 32 * 2**20
"""Rows that libllama may hold at once; its own default is 8 GiB, and no faster."""


PYTHON_BYTES = 30_000_000
"""A Python with libllama."""


def peak_bytes(largest: int) -> int:
    """Memory of the child for a largest tensor of so many weights; one row at the least."""
    slab = min(BUFFER_BYTES, 10 * largest)
    return PYTHON_BYTES + slab


def quantize(source: Path, target: Path, request: Mapping[str, Any]) -> None:
    """Write `target`.

    `request`: `file_type`; `head` and `embedding`, types or None; `overrides`, tensor -> type;
    `importance`, a file of gguf_importance or None.
    """
    child.call(
        "shortstack.export.gguf_quantize:quantize_here",
        {**request, "source": str(source), "target": str(target)},
        timeout_s=TIMEOUT_S,
        what=f"quantizing {target.name} with libllama",
    )


def quantize_here(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: the call itself."""
    lib = libllama.libllama()
    params = lib.llama_model_quantize_default_params()
    params.ftype = request["file_type"]
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    params.max_buf_size = BUFFER_BYTES
    if request["head"]:
        params.output_tensor_type = TYPES[request["head"]].number
    if request["embedding"]:
        params.token_embedding_type = TYPES[request["embedding"]].number
    alive = [_set_overrides(lib, params, request), _set_importance(lib, params, request)]
    libllama.clear_log()
    target = Path(request["target"])
    code = lib.llama_model_quantize(request["source"].encode(), request["target"].encode(), params)
    del alive  # C has read the arrays
    if code:
        words = libllama.last_words()
        if "iostream error" in words or shutil.disk_usage(target.parent).free < 2**20:
            raise disk_full(target)
        raise ShortstackError(
            f"libllama cannot quantize to {target.name}: {words}. Try another precision."
        )
    return {}


def _set_overrides(lib: Any, params: Any, request: Mapping[str, Any]) -> Any:
    """Exact names as patterns, so that no pattern reaches further than meant: libllama's are
    regular expressions, and its `blk.1.` is found in `blk.10.`, too."""
    named = request["overrides"]
    if not named:
        return None
    kind = lib.llama_model_tensor_override
    rows = [
        kind(f"^{re.escape(name)}$".encode(), TYPES[type_].number) for name, type_ in named.items()
    ]
    array = (kind * (len(rows) + 1))(*rows, kind(None, 0))
    params.tt_overrides = array
    return [array, _keep_file_type(lib, params, request)]


def _keep_file_type(lib: Any, params: Any, request: Mapping[str, Any]) -> Any:
    """Overrides in a file of plain floats: libllama heeds them only for quantized file types, so
    one is given, and the field that names it is written as asked."""
    if any(p.quantized and p.file_type == request["file_type"] for p in PRECISIONS.values()):
        return None
    params.ftype = PRECISIONS["Q8_0"].file_type
    entry = lib.llama_model_kv_override()
    entry.tag, entry.key = lib.LLAMA_KV_OVERRIDE_TYPE_INT, b"general.file_type"
    entry.value.val_i64 = request["file_type"]
    array = (lib.llama_model_kv_override * 2)(entry, lib.llama_model_kv_override())
    params.kv_overrides = array
    return array


def _set_importance(lib: Any, params: Any, request: Mapping[str, Any]) -> Any:
    if not request.get("importance"):
        return None
    from shortstack.export.importance_file import read_importance

    kind = lib.llama_model_imatrix_data
    arrays = read_importance(Path(request["importance"]))
    rows = [
        kind(name.encode(), array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), array.size)
        for name, array in arrays.items()
    ]
    table = (kind * (len(rows) + 1))(*rows, kind())
    params.imatrix = table
    return [table, arrays]
