"""How long steps say how far they are: a plain callable, so that stages know no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

OnProgress = Callable[[int, int], None]
"""Called with (done, total), in any unit; `total` is fixed during one step."""


def silent(done: int, total: int) -> None:
    """Say nothing."""


class Display(Protocol):
    """Where a pipeline shows its steps. The CLI draws bars; tests record; quiet says nothing."""

    def step(self, title: str) -> contextlib.AbstractContextManager[OnProgress]: ...

    def note(self, text: str) -> None: ...


class Quiet:
    """A Display that shows nothing."""

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[OnProgress]:
        yield silent

    def note(self, text: str) -> None:
        return None
