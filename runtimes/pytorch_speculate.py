"""Self-speculation: fewer layers of a model draft, all of them verify, greedily.

What comes out is what the whole model says, token by token: a drafted token is kept where it is the
whole model's likeliest one. SWIFT (arXiv:2410.06916) drafts without some middle layers; LayerSkip
(arXiv:2404.16710) and Balcony draft with the first layers and an exit, whose states verification
goes on from. One sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shortstack.early_exit.watched import Run, watched
from shortstack.errors import ShortstackError


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
    """Drafts on a cache that it shares with the whole model."""

    def start(self, prompt: Tensor) -> Tensor:
        """Empty the cache, run ids (1, n) through the whole model; logits that follow, (vocab,)."""
        ...

    def draft(self, token: Tensor, count: int) -> Tensor:
        """Ids (1, at most `count`) after `token`, shape (1, 1), that the cache does not hold."""
        ...

    def verify(self, token: Tensor, drafted: Tensor) -> Tensor:
        """The whole model's logits after `token` and after drafted ids, (positions, vocab)."""
        ...

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


class SkipDrafter:
    """Drafts without the layers `skip`, of which the first cannot be one."""

    def __init__(self, model: Any, skip: Collection[int]) -> None:
        _check_cache(model)
        n_layers = len(model.get_decoder().layers)
        self._skip = frozenset(skip)
        wrong = sorted(at for at in self._skip if not 0 < at < n_layers)
        if wrong:
            raise ShortstackError(
                f"layer {wrong[0]} cannot be skipped in drafts: name layers from 1 to "
                f"{n_layers - 1}."
            )
        self._model = model
        self._cache: Any = None
        self._held = 0

    def start(self, prompt: Tensor) -> Tensor:
        self._cache = _new_cache(self._model)
        self._held = prompt.shape[1]
        return _logits(self._model, prompt, self._cache)[-1]

    def draft(self, token: Tensor, count: int) -> Tensor:
        ids = []
        with watched(self._model, self._on_layer):
            for _ in range(count):
                token = _logits(self._model, token, self._cache)[-1:].argmax(-1, keepdim=True)
                ids.append(token)
        _shorten(self._cache.layers, self._held)
        return torch.cat(ids, 1)

    def _on_layer(self, index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        return hidden if index in self._skip else run(hidden, **named)

    def verify(self, token: Tensor, drafted: Tensor) -> Tensor:
        return _logits(self._model, torch.cat([token, drafted], 1), self._cache, keep=0)

    def keep(self, length: int) -> None:
        _shorten(self._cache.layers, length)
        self._held = length


class ExitDrafter:
    """Drafts with the first `depth` layers and the exit behind them; `exits` are those of
    `shortstack.exits.model`. Verification runs the layers behind `depth` alone."""

    def __init__(self, exits: Any, depth: int) -> None:
        _check_cache(exits.model)
        self._exits, self._depth, self._model = exits, depth, exits.model
        self._view = exits.at(depth)
        self._slots: Any = None
        self._held = 0
        self._states: list[Tensor] = []
        self._verifying = False

    def start(self, prompt: Tensor) -> Tensor:
        self._slots = self._exits.new_slots()
        self._held, self._states = 0, []
        with watched(self._view, self._on_layer):
            _logits(self._view, prompt, self._slots.at(self._depth))
        found = self._from_states()[-1]
        self.keep(prompt.shape[1])
        return found

    def draft(self, token: Tensor, count: int) -> Tensor:
        self._states, ids = [], []
        cache = self._slots.at(self._depth)
        with watched(self._view, self._on_layer):
            for _ in range(count):
                token = _logits(self._view, token, cache)[-1:].argmax(-1, keepdim=True)
                ids.append(token)
        return torch.cat(ids, 1)

    def _on_layer(self, index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        if self._verifying:
            if index >= self._depth:
                return run(hidden, **named)
            return torch.cat(self._states, 1) if index == self._depth - 1 else hidden
        hidden = run(hidden, **named)
        if index == self._depth - 1:
            self._states.append(hidden)
        return hidden

    def verify(self, token: Tensor, drafted: Tensor) -> Tensor:
        """The last drafted token is not run: the draft has no state of it."""
        return self._from_states()

    def _from_states(self) -> Tensor:
        """Run the layers behind the exit on the states of the draft; logits at each, (n, vocab).

        The layers before it already hold these tokens. While the model counts positions, they are
        shown without them.
        """
        cache = self._slots.at(len(self._model.get_decoder().layers))
        before = cache.layers[: self._depth]
        whole = [(slot.keys, slot.values) for slot in before]
        _shorten(before, self._held)
        count = sum(states.shape[1] for states in self._states)
        ids = torch.zeros((1, count), dtype=torch.long, device=self._states[0].device)
        self._verifying = True
        try:
            with watched(self._model, self._on_layer):
                return _logits(self._model, ids, cache, keep=0)
        finally:
            self._verifying = False
            for slot, (keys, values) in zip(before, whole, strict=True):
                slot.keys, slot.values = keys, values

    def keep(self, length: int) -> None:
        self._slots.crop(length)
        self._held = length


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
            guess = drafter.draft(pending, min(draft_tokens, count - len(tokens)))
            logits = drafter.verify(pending, guess)
            said, guessed = logits.argmax(-1).tolist(), guess[0].tolist()
            right = _agreed(guessed, said)
            kept = said[: right + 1][: count - len(tokens)]
            margins.append(_margin(logits[: len(kept)]))
            tokens += kept
            held += len(said[: right + 1])
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
        cache = _new_cache(model)
        ids = torch.tensor([list(prompt)], device=device)
        tokens = []
        for _ in range(count):
            ids = _logits(model, ids, cache)[-1:].argmax(-1, keepdim=True)
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
    two = logits.float().topk(2, dim=-1).values
    return (two[:, 0] - two[:, 1]).min()


def _logits(model: Any, ids: Tensor, cache: Any, keep: int = 1) -> Tensor:
    """Logits of the last `keep` positions (0: of all), shape (positions, vocab)."""
    made = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits: Tensor = made.logits[0]
    return logits


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


def _shorten(slots: Sequence[Any], length: int) -> None:
    """Keep the first `length` tokens of each slot that holds more."""
    for slot in slots:
        if slot.is_initialized and slot.keys.numel() and slot.keys.shape[-2] > length:
            slot.keys = slot.keys[..., :length, :]
            slot.values = slot.values[..., :length, :]


def _check_cache(model: Any) -> None:
    """Raise ShortstackError for a model whose cache cannot go back."""
    if any(getattr(slot, "is_sliding", False) for slot in _new_cache(model).layers):
        raise ShortstackError(
            "speculation goes back in the KV cache, and this model's sliding windows forget. "
            "Generate without it."
        )
