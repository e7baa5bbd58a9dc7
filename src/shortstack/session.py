"""What every runtime offers: one opened artifact, one sequence, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Session(Protocol):
    """An opened artifact holding one sequence and its KV cache. No sampling, no end-of-text stop.

    `prefill` starts a new sequence; `decode` continues it through the cache.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def info(self) -> dict[str, Any]:
        """What is in force: runtime name and version, threads, options that matter to a reader."""
        ...

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        """Empty the cache, run `tokens`; return logits of the last position, shape (vocab,).

        With `all_logits`, of every position: shape (len(tokens), vocab).
        """
        ...

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token to the cache; return the logits that follow it, shape (vocab,)."""
        ...

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids by the runtime's own tokenizer, no BOS added; None where it has none."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class Resumable(Session, Protocol):
    """A session that can go back in its sequence: what many continuations of one prompt need."""

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        """Forget all but the first `keep` tokens (1 or more), run `tokens` after them.

        Returns logits at each of `tokens`, shape (len(tokens), vocab); None, with the sequence
        lost, where the cache no longer holds what is needed: prefill.
        """
        ...


@runtime_checkable
class Extendable(Session, Protocol):
    """A session that takes many tokens at once behind those it holds: a prompt at depth."""

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run `tokens` after the cache's; return logits of the last position, shape (vocab,)."""
        ...


@runtime_checkable
class Batched(Session, Protocol):
    """A session opened for `batch` sequences of equal length, run side by side."""

    def prefill_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Empty the cache, run `rows`, shape (batch, n); return the last logits of each row,
        shape (batch, vocab)."""
        ...

    def extend_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same behind what the cache holds: shape (batch, n) in, (batch, vocab) out."""
        ...


@runtime_checkable
class ResumableRows(Batched, Protocol):
    """A batch that can go back, all sequences to one place."""

    def resume_rows(self, keep: int, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Forget all but the first `keep` tokens (1 or more) of each sequence, run `rows` after
        them, shape (batch, n).

        Returns the last logits of each row, shape (batch, vocab); None, with the sequences lost,
        where the cache no longer holds what is needed.
        """
        ...
