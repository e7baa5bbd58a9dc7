"""Sessions with known answers: known times, known memory, known deaths. The real protocol."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError
from shortstack.session import Session

VOCAB = 16
LOAD_S, PREFILL_S, DECODE_S = 0.05, 0.04, 0.02
ALLOCATED = 200_000_000


class KnownSession:
    """Counts up: after token n it wants n + 1. Each call takes the time it was given."""

    def __init__(self, threads: int, prefill_s: float = 0.0, decode_s: float = 0.0) -> None:
        self._threads = threads
        self._prefill_s = prefill_s
        self._decode_s = decode_s

    @property
    def vocab_size(self) -> int:
        return VOCAB

    @property
    def info(self) -> dict[str, Any]:
        return {"runtime": "fake", "version": "1", "threads": self._threads}

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        time.sleep(self._prefill_s)
        rows = np.stack([_after(token) for token in tokens])
        return rows if all_logits else rows[-1]

    def decode(self, token: int) -> NDArray[np.float32]:
        time.sleep(self._decode_s)
        return _after(token)

    def tokenize(self, text: str) -> list[int] | None:
        return None

    def close(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Hoarder(KnownSession):
    """Keeps ALLOCATED bytes of anonymous memory and maps a file, every page touched."""

    def __init__(self, threads: int, path: Path) -> None:
        super().__init__(threads)
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._touched = sum(self._mapped[at] for at in range(0, len(self._mapped), mmap.PAGESIZE))

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._hoard = np.ones(ALLOCATED, dtype=np.uint8)
        return super().prefill(tokens, all_logits=all_logits)


class Crasher(KnownSession):
    def decode(self, token: int) -> NDArray[np.float32]:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("unreachable")


class Hanger(KnownSession):
    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        signal.pause()
        raise AssertionError("unreachable")


class Babbler(KnownSession):
    """Prints garbage where a careless parent would look for the answer."""

    def decode(self, token: int) -> NDArray[np.float32]:
        print('{"result": 42}')
        return super().decode(token)


class Thrower(KnownSession):
    def decode(self, token: int) -> NDArray[np.float32]:
        raise RuntimeError("kernel says no")


def _after(token: int) -> NDArray[np.float32]:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[(token + 1) % VOCAB] = 1
    return logits


def _sleeper(threads: int, speed: float = 1.0) -> Session:
    time.sleep(LOAD_S)
    return KnownSession(threads, PREFILL_S / speed, DECODE_S / speed)


def _refuse() -> Session:
    raise ShortstackError("fake: this file is not a model. Export it again.")


def open_session(path: Path, runtime: str, *, threads: int, **_: object) -> Session:
    """The runtime's name says what the session does."""
    table = {
        "sleeper": lambda: _sleeper(threads, 2.0 if "pruned" in path.name else 1.0),
        "instant": lambda: KnownSession(threads),
        "hoarder": lambda: Hoarder(threads, path),
        "crasher": lambda: Crasher(threads),
        "hanger": lambda: Hanger(threads),
        "babbler": lambda: Babbler(threads),
        "thrower": lambda: Thrower(threads),
        "refuser": _refuse,
    }
    return table[runtime]()
