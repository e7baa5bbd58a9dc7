"""Self-speculation: fewer layers of a model draft, all of them verify, greedily.

What comes out is what the whole model says, token by token: a drafted token is kept where it is the
whole model's likeliest one. SWIFT (arXiv:2410.06916) drafts without some middle layers; LayerSkip
(arXiv:2404.16710) and Balcony draft with the first layers and an exit, whose states verification
goes on from. One sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shortstack.errors import ShortstackError
from shortstack.runtimes.pytorch_drafters import logits_of, new_cache


@dataclass(frozen=True)
class Speculated:
    """`tokens` generated; of `drafted` tokens `accepted` were the whole model's; it ran `passes`
    times. `least_margin`: the smallest lead, in logits, of a token over the next one: within
    rounding of 0, the batch of a verification and a single step may choose differently."""

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    passes: int
    least_margin: float


class Drafter(Protocol):
    """Drafts on a cache that it shares with the whole model; `modules`: what it runs, the model's
    own parts among them."""

    modules: tuple[nn.Module, ...]

    def start(self, prompt: Tensor) -> Tensor:
        """Empty the cache, run ids (1, n) through the whole model; logits that follow, (vocab,)."""
        ...

    def draft(self, token: Tensor, count: int) -> Tensor:
        """Ids (1, at most `count`) after `token`, shape (1, 1), that the cache does not hold; of
        a `count` of 0 none."""
        ...

    def verify(self, token: Tensor, drafted: Tensor) -> Tensor:
        """The whole model's logits after `token` and after every drafted id, (ids + 1, vocab)."""
        ...

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


def speculate(
    drafter: Drafter, prompt: Sequence[int], count: int, draft_tokens: int, device: Any
) -> Speculated:
    """`count` tokens after the prompt, drafted `draft_tokens` at a time; of 0 tokens the margin is
    infinite. Raises ShortstackError for a count below 0 and drafts of less than one token."""
    _check_counts(prompt, count)
    if draft_tokens < 1:
        raise ShortstackError(
            f"drafts of {draft_tokens} tokens say nothing to verify. Draft at least 1, or generate "
            "without speculation."
        )
    if not count:
        return Speculated((), 0, 0, 0, math.inf)
    with torch.inference_mode():
        logits = drafter.start(torch.tensor([list(prompt)], device=device))
        tokens = [int(logits.argmax())]
        held, margins = len(prompt), [_margin(logits[None])]
        drafted = accepted = passes = 0
        while len(tokens) < count:
            pending = torch.tensor([[tokens[-1]]], device=device)
            # the token that follows the last one accepted is the model's own, and needs no draft
            guess = drafter.draft(pending, min(draft_tokens, count - len(tokens) - 1))
            logits = drafter.verify(pending, guess)
            said, guessed = logits.argmax(-1).tolist(), guess[0].tolist()
            right = _agreed(guessed, said)
            margins.append(_margin(logits[: right + 1]))
            tokens += said[: right + 1]
            held += right + 1
            drafter.keep(held)
            drafted, accepted, passes = drafted + len(guessed), accepted + right, passes + 1
        least = float(torch.stack(margins).min())
    return Speculated(tuple(tokens), drafted, accepted, passes, least)


def greedy(model: Any, prompt: Sequence[int], count: int, device: Any) -> tuple[int, ...]:
    """The whole model's own tokens, one at a time: what speculation is held against."""
    _check_counts(prompt, count)
    if not count:
        return ()
    with torch.inference_mode():
        cache = new_cache(model)
        ids = torch.tensor([list(prompt)], device=device)
        tokens = []
        for _ in range(count):
            ids = logits_of(model, ids, cache)[-1:].argmax(-1, keepdim=True)
            tokens.append(ids)
        return tuple(torch.cat(tokens, 1)[0].tolist())


def _check_counts(prompt: Sequence[int], count: int) -> None:
    if count < 0 or not prompt:
        raise ShortstackError(
            f"{count} tokens after a prompt of {len(prompt)} cannot be generated. Give a prompt of "
            "at least one token, and 0 or more to generate."
        )


def _agreed(guessed: Sequence[int], said: Sequence[int]) -> int:
    """How many guessed tokens, from the first, are those that were said."""
    for at, (one, other) in enumerate(zip(guessed, said, strict=False)):
        if one != other:
            return at
    return min(len(guessed), len(said))


def _margin(logits: Tensor) -> Tensor:
    """The smallest lead of a row's highest logit, on its device: asking would wait for it."""
    logits = logits.float()
    best = logits.argmax(-1, keepdim=True)
    # topk takes ten times as long as a maximum
    return (logits.gather(-1, best) - logits.scatter(-1, best, -torch.inf).amax(-1, True)).min()
