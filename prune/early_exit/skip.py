"""Which layers a draft leaves out: searched for by how often the draft says the model's token."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortstack.early_exit.checks import ModelHead
from shortstack.early_exit.watched import Run, watched
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent

RESTING = 50
"""Draws in a row that were tried before."""


@dataclass(frozen=True)
class SkipChoice:
    """`agreement`: share of the windows' positions where the draft's likeliest token is the whole
    model's."""

    skip: tuple[int, ...]
    agreement: float
    trials: int


def choose_skip(
    model: Any,
    windows: Sequence[Sequence[int]],
    count: int,
    *,
    trials: int = 100,
    seed: int = 0,
    progress: OnProgress = silent,
) -> SkipChoice:
    """`count` layers to skip, by SWIFT's score (arXiv:2410.06916): agreement of argmaxes.

    Whole layers, the first and the last stay. Every run of neighbours is tried, as far as `trials`
    goes, then exchanges of one layer of the best, kept where they agree more often (SWIFT searches
    at random and by Bayesian optimisation). Raises ShortstackError where so many cannot be skipped.
    """
    n_layers = len(model.get_decoder().layers)
    inner = range(1, n_layers - 1)
    if not 1 <= count <= len(inner):
        raise ShortstackError(
            f"{count} of {n_layers} layers cannot be skipped in drafts: name 1 to {len(inner)}."
        )
    head = ModelHead(model)
    ids = [torch.tensor([list(window)], device=head.device) for window in windows]
    wanted = [_said(model, head, part, ()) for part in ids]
    draw, tried = random.Random(seed), dict[tuple[int, ...], float]()
    runs = [tuple(range(start, start + count)) for start in range(1, n_layers - count)]
    draw.shuffle(runs)
    repeats = 0
    # a search comes to rest where it draws what it knows again and again
    while len(tried) < trials and repeats < RESTING:
        best = max(tried, key=lambda skip: tried[skip]) if tried else ()
        candidate = runs.pop() if runs else _exchanged(best, inner, draw)
        repeats = repeats + 1 if candidate in tried else 0
        if not repeats:
            tried[candidate] = _agreement(model, head, ids, wanted, candidate)
        progress(len(tried), trials)
    best = max(tried, key=lambda skip: tried[skip])
    return SkipChoice(best, tried[best], len(tried))


def _exchanged(skip: tuple[int, ...], inner: Sequence[int], draw: random.Random) -> tuple[int, ...]:
    others = [layer for layer in inner if layer not in skip]
    if not others:
        return skip
    gone = draw.choice(skip)
    return tuple(sorted((*(layer for layer in skip if layer != gone), draw.choice(others))))


def _agreement(
    model: Any,
    head: ModelHead,
    ids: Sequence[Tensor],
    wanted: Sequence[Tensor],
    skip: Collection[int],
) -> float:
    same = [
        (_said(model, head, part, skip) == full).float()
        for part, full in zip(ids, wanted, strict=True)
    ]
    return float(torch.cat(same).mean())


def _said(model: Any, head: ModelHead, ids: Tensor, skip: Collection[int]) -> Tensor:
    """The likeliest next token at every position of ids (1, n)."""

    def on_layer(index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        return hidden if index in skip else run(hidden, **named)

    with torch.inference_mode(), watched(model, on_layer):
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        return head.logits(states).argmax(-1)
