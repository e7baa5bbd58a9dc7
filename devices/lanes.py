"""One sequence or many behind one face, so that the clock's code is the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError
from shortstack.session import Batched, Extendable, Resumable, ResumableRows, Session


class Lanes(Protocol):
    """What a trial does with a session. `prompt` is made before the clock starts."""

    def prompt(self, tokens: Sequence[int]) -> Any: ...

    def prefill(self, prompt: Any) -> NDArray[np.float32]: ...

    def extend(self, prompt: Any) -> NDArray[np.float32]: ...

    def choose(self, logits: NDArray[np.float32]) -> Any:
        """The likeliest token of each sequence."""
        ...

    def decode(self, chosen: Any) -> NDArray[np.float32]: ...

    def again(self, prompt: Any, end: int) -> NDArray[np.float32] | None:
        """Logits behind the prompt, as a step from its end at token `end`: its last token once
        more. None where the session does not go back."""
        ...


class One:
    """A single sequence, through the calls that an application would make."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.prefill, self.decode = session.prefill, session.decode

    def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens

    def extend(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        if not isinstance(self._session, Extendable):
            raise ShortstackError("this runtime takes no prompt at depth. Ask for depth 0.")
        return self._session.extend(prompt)

    def choose(self, logits: NDArray[np.float32]) -> int:
        return int(logits.argmax())

    def again(self, prompt: Sequence[int], end: int) -> NDArray[np.float32] | None:
        if not isinstance(self._session, Resumable):
            return None
        rows = self._session.resume(end, prompt[-1:])
        return None if rows is None else np.asarray(rows[-1])


class Many:
    """A batch. Row i is the prompt turned by i tokens: equal length, other content."""

    def __init__(self, session: Session, batch: int) -> None:
        if not isinstance(session, Batched):
            raise ShortstackError("this runtime runs one sequence at a time. Ask for batch 1.")
        self._session, self._batch = session, batch
        self.prefill, self.extend = session.prefill_rows, session.extend_rows
        self.decode = session.extend_rows

    def prompt(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        return np.stack([np.roll(np.array(tokens, np.int64), -row) for row in range(self._batch)])

    def choose(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(logits.argmax(axis=1)[:, None])

    def again(self, prompt: NDArray[np.int64], end: int) -> NDArray[np.float32] | None:
        if not isinstance(self._session, ResumableRows):
            return None
        return self._session.resume_rows(end, prompt[:, -1:])


def lanes(session: Session, batch: int) -> Lanes:
    return One(session) if batch == 1 else Many(session, batch)
