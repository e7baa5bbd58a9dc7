"""LLM-Streamline (Chen et al., arXiv:2403.19135): one trained layer instead of a run of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, unknown
from shortstack.progress import OnProgress, silent
from shortstack.prune.apply import apply_plan
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.heal.train import heal
from shortstack.prune.plan import PrunePlan
from shortstack.prune.rewrite import rewrite

OBJECTIVES = ("mse", "lm")
REPLACEMENTS = ("layer", "swiglu", "none")
"""The paper's plain FFN is not among them: no layer of a Llama holds an MLP without a gate."""


def check_choice(checkpoint: Checkpoint, drop: int, objective: str, replacement: str) -> None:
    """Raise ShortstackError for what `plan_run` or `streamline` would refuse, before either runs
    the model."""
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    _check_length(checkpoint, drop + _inherited(replacement))


def _inherited(replacement: str) -> int:
    """How many layers of the run stay: the one that the replacement begins as."""
    if replacement not in REPLACEMENTS:
        raise unknown("replacement", replacement, REPLACEMENTS)
    return int(replacement != "none")


def _check_length(checkpoint: Checkpoint, length: int) -> None:
    if not 1 <= length < checkpoint.n_layers:
        raise ShortstackError(
            f"a run of {length} layers leaves nothing of the {checkpoint.n_layers} layers of "
            f"{checkpoint.path}. Drop fewer."
        )


def most_alike_run(
    checkpoint: Checkpoint, windows: list[list[int]], length: int, dtype: str = "auto"
) -> tuple[int, tuple[float, ...]]:
    """The first layer l of the run of `length` layers that changes the direction of the hidden
    states least, and the mean cosine of h_l and h_(l+length) for every l.

    l* = argmax_l E_t[cos(h_(l,t), h_(l+n,t))] (section 3.1 of the paper). No layer is protected.
    """
    from shortstack.prune.calibrate import LayerwiseModel, batches
    from shortstack.prune.scoring import block_influence

    _check_length(checkpoint, length)
    distances = [0.0] * (checkpoint.n_layers - length + 1)
    count = 0
    with torch.inference_mode():
        model = LayerwiseModel(checkpoint, dtype)
        for tokens in batches(windows):
            states = [model.embed(tokens)]
            for index in range(model.n_layers):
                states.append(model.layer(index, states[-1]))
            for start in range(len(distances)):
                distances[start] += float(block_influence(states[start], states[start + length]))
            count += tokens.numel()
    cosines = tuple(1 - distance / count for distance in distances)
    return max(range(len(cosines)), key=lambda start: cosines[start]), cosines


def plan_run(
    checkpoint: Checkpoint, windows: list[list[int]], drop: int, replacement: str = "layer"
) -> PrunePlan:
    """Drop `drop` layers of one run. A replacement stands for one layer more than goes, so that the
    result is as deep as without one; it lies where the run began."""
    inherited = _inherited(replacement)
    first, cosines = most_alike_run(checkpoint, windows, drop + inherited)
    last = first + drop + inherited - 1
    facts = {
        "unit": "mean cosine across the run that begins at a layer",
        "cosines": [round(cosine, 6) for cosine in cosines],
        "replacement": replacement,
        "run": [first, last],
        "tokens": sum(map(len, windows)),
    }
    gone = tuple(range(first + inherited, last + 1))
    attention = (first,) if replacement == "swiglu" else ()
    return PrunePlan(checkpoint.n_layers, gone, "cosine-run", facts=facts, attention=attention)


def streamline(
    original: Checkpoint,
    plan: PrunePlan,
    train_windows: Sequence[Sequence[int]],
    selection_windows: Sequence[Sequence[int]],
    work: Path,
    out: Path,
    settings: HealSettings,
    *,
    objective: str = "mse",
    progress: OnProgress = silent,
    note: Callable[[str], None] = lambda text: None,
    state: Path | None = None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Cut by a plan of `plan_run` in the empty folder `work`, train its replacement, write `out`.

    `objective`: `mse` on the hidden states behind the run, streamed from the original; `lm` on the
    next token through the whole model. Loss and trained layer of `settings` are set here; the
    facts are those of `heal`. A plan without a replacement is cut and measured only.
    """
    check_choice(original, len(plan.drop), objective, plan.facts["replacement"])
    kind, (first, last) = plan.facts["replacement"], plan.facts["run"]
    (work / "cut").mkdir()
    cut = apply_plan(original, plan, work / "cut")
    if kind == "swiglu":
        (work / "random").mkdir()
        values = _random_mlp(cut, first, settings.seed)
        cut = rewrite(cut, values, work / "random")
    if kind == "none":
        chosen = dataclasses.replace(settings, loss="ce", tokens=0)
    elif objective == "lm":
        chosen = dataclasses.replace(settings, loss="ce", train=f"layers:{first}")
    else:
        chosen = dataclasses.replace(
            settings, loss="mse", train=f"layers:{first}", replaces=(first, last)
        )
    windows = (train_windows, selection_windows)
    return heal(cut, original, *windows, out, chosen, progress=progress, note=note, state=state)


def _random_mlp(checkpoint: Checkpoint, layer: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights of a layer's MLP as transformers begins them: normal, biases zero."""
    spread = float(checkpoint.text.get("initializer_range", 0.02))
    numbers = np.random.default_rng(seed)
    made = {}
    for rule in checkpoint.family.layer:
        name = checkpoint.family.layer_name(layer, rule)
        if rule.part == "mlp" and name in checkpoint.tensors:
            shape = checkpoint.tensors[name].shape
            made[name] = numbers.normal(0, spread, shape).astype(np.float32)
            if name.endswith(".bias"):
                made[name][:] = 0
    return made
