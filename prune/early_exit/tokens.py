"""Early exits for generation: which tokens of a text may leave, from their states alone.

A check through the whole head costs as much as eight layers of SmolLM2-135M. So the score is linear
in the state itself, and the head is run once, where the token leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortstack.early_exit.checks import ModelHead
from shortstack.early_exit.numbers import unit
from shortstack.early_exit.rule import STATE, Rule
from shortstack.early_exit.watched import Run, watched
from shortstack.progress import OnProgress, silent
from shortstack.prune.early_exit.calibrate import Limits, Traced, calibrated
from shortstack.prune.early_exit.classifier import fit_classifier

HEAD_ROWS = 256


def token_states(
    model: Any,
    windows: Sequence[Sequence[int]],
    layers: Sequence[int],
    progress: OnProgress = silent,
) -> tuple[Tensor, Tensor]:
    """(states (tokens, checks, width) in float32, the model's likeliest next tokens (tokens,)) at
    every position of the windows but the first, on the CPU."""
    wanted = set(layers)
    head = ModelHead(model)
    states, full = [], []
    for done, window in enumerate(windows, 1):
        kept: list[Tensor] = []

        def keep(
            index: int, run: Run, hidden: Tensor, named: dict[str, Any], kept: list[Tensor] = kept
        ) -> Tensor:
            hidden = run(hidden, **named)
            if index + 1 in wanted:
                kept.append(hidden[0, 1:].float().cpu())
            return hidden

        with torch.inference_mode(), watched(model, keep):
            ids = torch.tensor([list(window)], device=head.device)
            last = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, 1:]
            full.append(_likeliest(head, last))
        states.append(torch.stack(kept, 1))
        progress(done, len(windows))
    return torch.cat(states), torch.cat(full)


def _likeliest(head: ModelHead, normed: Tensor) -> Tensor:
    return torch.cat([head.logits(part).argmax(-1).cpu() for part in normed.split(HEAD_ROWS)])


def lens(model: Any, states: Tensor) -> Tensor:
    """The token that the model's norm and head read off each state, (tokens, checks)."""
    head = ModelHead(model)
    columns = []
    with torch.inference_mode():
        for check in range(states.shape[1]):
            there = states[:, check].to(head.device, head.dtype)
            columns.append(_likeliest(head, head.normed(there)))
    return torch.stack(columns, 1)


def fit_tokens(
    model: Any,
    fit: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    layers: Sequence[int],
    *,
    max_changed: float,
    model_sha256: str,
    classifier: str = "logistic",
) -> Rule:
    """A rule whose tokens differ from the whole model's at `max_changed` of the validation
    positions at most, read with the whole model's cache.

    `fit` and `validation` are of `token_states`. Raises ShortstackError where no threshold holds.
    """
    states, full = fit
    same = (lens(model, states) == full[:, None]).numpy()
    features = torch.stack([unit(states[:, at]) for at in range(len(layers))], 1).numpy()
    weights, bias = fit_classifier(classifier, features, same)
    n_layers = len(model.get_decoder().layers)
    rule = Rule(
        *(tuple(layers), STATE, weights, bias, 0.0, classifier),
        model_sha256=model_sha256,
        n_layers=n_layers,
    )
    found = calibrated(_traced(model, rule, validation), Limits(max_changed))
    facts = {"max_changed": max_changed, "validation": found.to_dict(), "fit_tokens": len(full)}
    return dataclasses.replace(rule, threshold=found.threshold, facts=facts)


def _traced(model: Any, rule: Rule, validation: tuple[Tensor, Tensor]) -> Traced:
    """The right answer is the whole model's: a loss is a changed token."""
    states, full = validation
    features = torch.stack([unit(states[:, at]) for at in range(len(rule.layers))], 1).numpy()
    scores = np.einsum("rcf,cf->rc", features, rule.weights) + rule.bias
    said, wanted = lens(model, states).numpy(), full.numpy()
    return Traced(scores.astype(np.float32), said, wanted, wanted, rule.layers, rule.n_layers)
