"""Sessions with known answers: known times, known memory, known deaths. The real protocol."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError
from shortstack.session import Session

VOCAB = 16
LOAD_S, PREFILL_S, DECODE_S = 0.05, 0.04, 0.02
LONG_LOAD_S, LONG_PREFILL_S, LONG_DECODE_S = 1.5, 1.0, 0.4
"""So long that waking late, some milliseconds on a busy machine, is far below two per cent."""

ALLOCATED = 400_000_000


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
        return {
            "runtime": "fake",
            "version": "1",
            "threads": self._threads,
            "order": os.environ.get("CUDA_DEVICE_ORDER"),
        }

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        time.sleep(self._prefill_s)
        rows = np.stack([_after(token) for token in tokens])
        return rows if all_logits else rows[-1]

    def decode(self, token: int) -> NDArray[np.float32]:
        time.sleep(self._decode_s)
        return _after(token)

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self.prefill(tokens)

    def tokenize(self, text: str) -> list[int] | None:
        return None

    def close(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class GoesBack(KnownSession):
    """Decodes behind the same prompt again and again; `kept` are the tokens kept each time."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.kept: list[int] = []

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        self.kept.append(keep)
        return np.stack([_after(token) for token in tokens])


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


class LateCrasher(KnownSession):
    """Dies in the second prompt: behind the warm-up, or in none of a memory trial."""

    _prompts = 0

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._prompts += 1
        if self._prompts == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().prefill(tokens, all_logits=all_logits)


class Hanger(KnownSession):
    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        signal.pause()
        raise AssertionError("unreachable")


class Babbler(KnownSession):
    """Prints garbage where a careless parent would look for the answer."""

    def decode(self, token: int) -> NDArray[np.float32]:
        print('{"result": 42}\n{"progress": [1, 2]}\n\x00\x1b[31m')
        print("{", "\ufffd" * 2000, file=sys.stderr)
        os.write(1, b"\xff\xfe not text")
        return super().decode(token)


class Rows(KnownSession):
    """Takes its batch's time once, however many rows there are."""

    def prefill_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        time.sleep(self._prefill_s)
        return self.extend_rows(rows)

    def extend_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.stack([_after(int(row[-1])) for row in rows])


class RowsGoBack(Rows):
    """A batch that decodes behind its prompts again and again."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.kept: list[int] = []

    def resume_rows(self, keep: int, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        self.kept.append(keep)
        return self.extend_rows(rows)


class Settler(KnownSession):
    """The first decode steps are slow, each faster than the one before; then all are alike."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._steps = 0

    def decode(self, token: int) -> NDArray[np.float32]:
        self._steps += 1
        time.sleep(0.02 + 0.1 * 0.6**self._steps)
        return super().decode(token)


class Wanderer(KnownSession):
    """Every window of four decode steps takes another time than the one before."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._steps = 0

    def decode(self, token: int) -> NDArray[np.float32]:
        self._steps += 1
        time.sleep(0.005 * (1 + self._steps % 16))
        return super().decode(token)


class Thrower(KnownSession):
    def decode(self, token: int) -> NDArray[np.float32]:
        raise RuntimeError("kernel says no")


class Quantizer(KnownSession):
    """Made its weights smaller while it loaded them."""

    @property
    def info(self) -> dict[str, Any]:
        return {**super().info, "weight_bytes": 700, "weight_bytes_per_token": 600}


def _after(token: int) -> NDArray[np.float32]:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[(token + 1) % VOCAB] = 1
    return logits


def _sleeper(threads: int, speed: float = 1.0) -> Session:
    time.sleep(LOAD_S)
    return KnownSession(threads, PREFILL_S / speed, DECODE_S / speed)


def _long_sleeper(threads: int) -> Session:
    time.sleep(LONG_LOAD_S)
    return KnownSession(threads, LONG_PREFILL_S, LONG_DECODE_S)


def _refuse(why: str) -> Session:
    raise ShortstackError(why)


def open_session(path: Path, runtime: str, *, threads: int, **_: object) -> Session:
    """The runtime's name says what the session does."""
    table: dict[str, Callable[[], Session]] = {
        "sleeper": lambda: _sleeper(threads, 2.0 if "pruned" in path.name else 1.0),
        "instant": lambda: KnownSession(threads),
        "long sleeper": lambda: _long_sleeper(threads),
        "rows": lambda: Rows(threads, 0.2, 0.0),
        "settler": lambda: Settler(threads),
        "wanderer": lambda: Wanderer(threads),
        "quantizer": lambda: Quantizer(threads),
        "hoarder": lambda: Hoarder(threads, path),
        "crasher": lambda: Crasher(threads),
        "late crasher": lambda: LateCrasher(threads),
        "dies when timed": lambda: LateCrasher(threads),
        "pathological": lambda: _refuse(f"{path} has '/home/somebody/models/x.bin' in it"),
        "hanger": lambda: Hanger(threads),
        "babbler": lambda: Babbler(threads),
        "thrower": lambda: Thrower(threads),
        "refuser": lambda: _refuse("fake: this file is not a model. Export it again."),
    }
    return table[runtime]()
