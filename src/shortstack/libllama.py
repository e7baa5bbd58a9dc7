"""libllama through its C API: loaded once, its log kept in memory instead of on the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections import deque
from types import ModuleType
from typing import Any

from shortstack.errors import MissingExtraError, one_line

LOG_LINES = 20_000
"""A quantization writes a line or two a tensor; a model of 80 layers has about 700 tensors."""


@functools.cache
def libllama() -> ModuleType:
    """The module of llama-cpp-python that mirrors llama.h, initialised, with its log captured.

    Raises MissingExtraError if it is not installed.
    """
    _one_libstdcxx()
    try:
        import llama_cpp.llama_cpp as lib
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf", "running or quantizing GGUF") from None
    lib.llama_log_set(_callback(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib


def _one_libstdcxx() -> None:
    """Let every library find the process's own C++ runtime first, NumPy's and torch's.

    Builds of llama.cpp with -static-libstdc++ export their copy of it. Where both are there, half
    of a locale comes from each, and std::regex, which splits a tokenizer's text, dies of SIGSEGV.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a system without one has nothing to mix
            ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


_fragments: deque[str] = deque(maxlen=LOG_LINES)


@functools.cache  # ctypes does not keep a callback alive, this cache does
def _callback(lib: ModuleType) -> Any:
    def keep(level: int, text: bytes, _: object) -> None:
        _fragments.append(text.decode("utf-8", "replace"))

    return lib.llama_log_callback(keep)


def log() -> list[str]:
    """The log so far; lines that came in pieces are joined."""
    return "".join(_fragments).splitlines()


def clear_log() -> None:
    _fragments.clear()


def last_words(count: int = 3) -> str:
    """The last lines of the log that speak of a failure, folded to one line."""
    signs = ("error", "fail", "unknown", "unable", "invalid", "missing", "exception")
    lines = [line for line in log() if any(sign in line.lower() for sign in signs)]
    return one_line(" | ".join(lines[-count:]), 300) or "it gave no reason"


def system_info() -> str:
    """What the CPU backend was built for and found, e.g. `CPU : AVX2 = 1 | AVX512 = 1`."""
    words: bytes = libllama().llama_print_system_info()
    return words.decode().strip(" |")


def has_amx() -> bool:
    """Whether the backend would use AMX tiles, where builds by gcc 12 crash on batches."""
    return "AMX_INT8 = 1" in system_info()
