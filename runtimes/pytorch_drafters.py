"""What drafts for self-speculation: a model without some of its layers, or its first layers and an
exit. Both share the model's cache and cut it back to what was accepted.

A head over all tokens is a large part of a draft: 8 of the 38 layers' worth that SmolLM2-135M has.
Drafts may say the tokens of a `vocabulary` alone (FR-Spec, arXiv:2502.14856: those that are
frequent in text), by their rows of the head; verification has them all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shortstack.early_exit.checks import ModelHead
from shortstack.early_exit.watched import Run, fill_cache, watched
from shortstack.errors import ShortstackError

Vocabulary = Sequence[int] | NDArray[np.integer]


class DraftHead:
    """A model's head over `vocabulary`, whole numbers, and what was said before, or over all.

    It is not sure of a token whose probability, among those it may say, is below
    `least_probability`. Raises ShortstackError for an empty vocabulary, ids that the model has not,
    and what is no probability.
    """

    def __init__(
        self, model: Any, vocabulary: Vocabulary | None, least_probability: float = 0.0
    ) -> None:
        if not 0 <= least_probability < 1:
            raise ShortstackError(
                f"{least_probability} is no probability below which drafts end. Name one from 0 "
                "to less than 1."
            )
        self._least = least_probability
        self._whole = self._cut = ModelHead(model)
        self._ids: Tensor | None = None
        if vocabulary is not None:
            self._own = _checked(vocabulary, self._whole.n_tokens).to(self._whole.device)
            self._cut = self._whole.only(self._own)
            self.start(self._own[None, :0])

    @property
    def output(self) -> nn.Module:
        """The linear layer: the model's own, or one of some of its rows."""
        return self._cut.output

    def start(self, prompt: Tensor) -> None:
        """Text begins: forget what was said, hear ids (1, n)."""
        if self._cut is not self._whole:
            self._ids, self._known = self._own, set(self._own.tolist())
            self.hear(prompt)

    def hear(self, ids: Tensor) -> None:
        """These ids, (1, n), may be said again: names are rare in text and frequent in one."""
        if self._ids is not None:
            new = sorted(set(ids[0].tolist()) - self._known)
            if new:
                self._known.update(new)
                self._ids = torch.cat([self._ids, self._ids.new_tensor(new)])

    def token(self, normed: Tensor) -> Tensor | None:
        """The likeliest token, shape (1, 1), of what the last norm gave, (1, width); None where
        it is not sure."""
        logits = self._cut.logits(normed)
        if self._ids is not None and len(self._ids) > len(self._own):
            heard = self._whole.of(self._ids[len(self._own) :], normed)
            logits = torch.cat([logits, heard], 1)
        best = logits.argmax(-1, keepdim=True)
        if (
            self._least
            and float((logits.gather(1, best) - logits.logsumexp(1)).exp()) < self._least
        ):
            return None
        return best if self._ids is None else self._ids[best]


def _checked(vocabulary: Vocabulary, n_tokens: int) -> Tensor:
    ids = np.unique(np.asarray(vocabulary))
    if not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ShortstackError(
            "a vocabulary of drafts is a list of token ids, whole numbers, at least one. Count "
            "those of a text with shortstack.prune.early_exit.frequent, or leave it out."
        )
    wrong = ids[(ids < 0) | (ids >= n_tokens)]
    if len(wrong):
        raise ShortstackError(
            f"token {wrong[0]} of the vocabulary of drafts is none of the model's {n_tokens}. "
            "Count tokens with this model's tokenizer."
        )
    return torch.from_numpy(ids.astype(np.int64))


class SkipDrafter:
    """Drafts without the layers `skip`, of which the first cannot be one."""

    def __init__(
        self,
        model: Any,
        skip: Collection[int],
        *,
        vocabulary: Vocabulary | None = None,
        least_probability: float = 0.0,
    ) -> None:
        check_cache(model)
        n_layers = len(model.get_decoder().layers)
        self._skip = frozenset(skip)
        wrong = sorted(at for at in self._skip if not 0 < at < n_layers)
        if wrong:
            raise ShortstackError(
                f"layer {wrong[0]} cannot be skipped in drafts: name layers from 1 to "
                f"{n_layers - 1}."
            )
        self._model, self._head = model, DraftHead(model, vocabulary, least_probability)
        self.modules: tuple[nn.Module, ...] = (model, self._head.output)
        self._cache: Any = None
        self._held = 0

    def start(self, prompt: Tensor) -> Tensor:
        self._head.start(prompt)
        self._cache = new_cache(self._model)
        self._held = prompt.shape[1]
        return logits_of(self._model, prompt, self._cache)[-1]

    def draft(self, token: Tensor, count: int) -> Tensor:
        self._head.hear(token)
        ids = [token]
        with watched(self._model, self._on_layer):
            while len(ids) <= count:
                found = self._head.token(_normed(self._model, ids[-1], self._cache))
                if found is None:
                    break
                ids.append(found)
        _shorten(self._cache.layers, self._held)
        return torch.cat(ids, 1)[:, 1:]

    def _on_layer(self, index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        return hidden if index in self._skip else run(hidden, **named)

    def verify(self, token: Tensor, drafted: Tensor) -> Tensor:
        return logits_of(self._model, torch.cat([token, drafted], 1), self._cache, keep=0)

    def keep(self, length: int) -> None:
        _shorten(self._cache.layers, length)
        self._held = length


class ExitDrafter:
    """Drafts with the first `depth` layers and the exit behind them; `exits` are those of
    `shortstack.exits.model`. Verification runs the layers behind `depth` alone."""

    def __init__(
        self,
        exits: Any,
        depth: int,
        *,
        vocabulary: Vocabulary | None = None,
        least_probability: float = 0.0,
    ) -> None:
        check_cache(exits.model)
        self._exits, self._depth, self._model = exits, depth, exits.model
        self._view = exits.at(depth)
        self._head = DraftHead(exits.model, vocabulary, least_probability)
        self.modules: tuple[nn.Module, ...] = (self._model, self._view, self._head.output)
        self._slots: Any = None
        self._held = 0
        self._states: list[Tensor] = []
        self._asked = self._verifying = False

    def start(self, prompt: Tensor) -> Tensor:
        self._head.start(prompt)
        self._slots = self._exits.new_slots()
        self._held, self._states = 0, []
        with watched(self._view, self._on_layer):
            self._run(prompt, asked=False)
        found = self._from_states(keep=1)[-1]
        self.keep(prompt.shape[1])
        return found

    def draft(self, token: Tensor, count: int) -> Tensor:
        self._head.hear(token)
        self._states, ids = [], [token]
        with watched(self._view, self._on_layer):
            while len(ids) <= count:
                found = self._head.token(self._run(ids[-1], asked=True))
                if found is None:
                    break
                ids.append(found)
            else:
                # verification says what follows the last one, too
                self._run(ids[-1], asked=False)
        return torch.cat(ids, 1)[:, 1:]

    def _run(self, ids: Tensor, *, asked: bool) -> Tensor:
        """States behind the exit's norm where it is `asked`; else its layer only gets keys and
        values, which later drafts look back at."""
        self._asked = asked
        return _normed(self._view, ids, self._slots.at(self._depth))

    def _on_layer(self, index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        if self._verifying:
            if index >= self._depth:
                return run(hidden, **named)
            return torch.cat(self._states, 1) if index == self._depth - 1 else hidden
        if index == self._depth and not self._asked:
            fill_cache(run, hidden, named)
            return hidden
        hidden = run(hidden, **named)
        if index == self._depth - 1:
            self._states.append(hidden)
        return hidden

    def verify(self, token: Tensor, drafted: Tensor) -> Tensor:
        return self._from_states(keep=0)

    def _from_states(self, keep: int) -> Tensor:
        """Run the layers behind the exit on the states of the draft; logits at the last `keep`
        (0: at each), (n, vocab).

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
                return logits_of(self._model, ids, cache, keep)
        finally:
            self._verifying = False
            for slot, (keys, values) in zip(before, whole, strict=True):
                slot.keys, slot.values = keys, values

    def keep(self, length: int) -> None:
        self._slots.crop(length)
        self._held = length


def logits_of(model: Any, ids: Tensor, cache: Any, keep: int = 1) -> Tensor:
    """Logits of the last `keep` positions (0: of all), shape (positions, vocab)."""
    made = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits: Tensor = made.logits[0]
    return logits


def _normed(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """What the head reads at the last position, shape (1, width)."""
    made = model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    normed: Tensor = made.last_hidden_state[0, -1:]
    return normed


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


def _shorten(slots: Collection[Any], length: int) -> None:
    """Keep the first `length` tokens of each slot that holds more."""
    for slot in slots:
        if slot.is_initialized and slot.keys.numel() and slot.keys.shape[-2] > length:
            slot.keys = slot.keys[..., :length, :]
            slot.values = slot.values[..., :length, :]


def check_cache(model: Any) -> None:
    """Raise ShortstackError for a model whose cache cannot go back."""
    if any(getattr(slot, "is_sliding", False) for slot in new_cache(model).layers):
        raise ShortstackError(
            "speculation goes back in the KV cache, and this model's sliding windows forget. "
            "Generate without it."
        )
