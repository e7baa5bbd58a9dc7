"""Any artifact behind a runtime's session, scored row by row; beginnings alike run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shortstack.evaluate.scorer import Pair, Scored, Stop, check_pairs
from shortstack.progress import OnProgress, silent
from shortstack.session import Resumable, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SessionScorer:
    """Scores with one opened session, which `close` closes.

    Rows are run in the order that puts equal beginnings side by side; what a row shares with the
    one before it stays in the session's cache, where the session can go back.
    """

    def __init__(self, session: Session, *, max_tokens: int) -> None:
        """`max_tokens`: the context that the session was opened with."""
        self._session = session
        self.max_tokens = max_tokens
        self._held: list[int] = []
        """Tokens whose keys and values the session's cache holds."""

    @property
    def info(self) -> dict[str, Any]:
        return self._session.info

    def log_likelihoods(self, pairs: Sequence[Pair], progress: OnProgress = silent) -> list[Scored]:
        fitting = check_pairs(pairs, self.max_tokens)
        # choices of a question lie side by side; sorted, so do questions with one long context
        order = sorted(range(len(pairs)), key=lambda index: (fitting[index][0], index))
        found: list[Scored | None] = [None] * len(pairs)
        for done, index in enumerate(order, 1):
            found[index] = self._score(*fitting[index])
            progress(done, len(order))
        return [one for one in found if one is not None]

    def nats(self, windows: Sequence[list[int]], progress: OnProgress = silent) -> list[Scored]:
        pairs = [(window[:1], window[1:]) for window in windows]
        return self.log_likelihoods(pairs, progress)

    def log_probs(self, window: list[int]) -> NDArray[np.float32]:
        self._held = []
        return _log_softmax(self._session.prefill(window, all_logits=True))

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        stop: Stop,
        progress: OnProgress = silent,
    ) -> list[list[int]]:
        found = []
        room = max(1, self.max_tokens - max_tokens)
        self._held = []
        for done, prompt in enumerate(prompts, 1):
            ids = [int(self._session.prefill(prompt[-room:]).argmax())]
            while not stop(ids) and len(ids) < max_tokens:
                ids.append(int(self._session.decode(ids[-1]).argmax()))
            found.append(ids)
            progress(done, len(prompts))
        return found

    def _score(self, context: list[int], continuation: list[int]) -> Scored:
        # the last token predicts nothing that is asked for
        tokens = [*context, *continuation[:-1]]
        logits = self._run(tokens, first=len(context) - 1)
        targets = np.array(continuation)
        rows = _log_softmax(logits)
        nats = -rows[np.arange(len(targets)), targets].sum(dtype=np.float64)
        greedy = bool((logits.argmax(-1) == targets).all())
        return Scored(float(nats), len(targets), greedy)

    def _run(self, tokens: list[int], first: int) -> NDArray[np.float32]:
        """Logits at positions `first` and on, with what the cache already holds kept."""
        keep = min(_common(self._held, tokens), first)
        held, self._held = self._held, []  # unknown, should the session fail
        logits = None
        if keep and held and isinstance(self._session, Resumable):
            logits = self._session.resume(keep, tokens[keep:])
        if logits is None:
            keep = 0
            logits = self._session.prefill(tokens, all_logits=True)
        self._held = tokens
        return logits[first - keep :]

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), np.float32)
