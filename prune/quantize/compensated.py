"""Quantize layer by layer, each fitted to what the quantized layers before it give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress
from shortstack.prune.calibrate import LayerwiseModel
from shortstack.prune.quantize.compensate import (
    factor_of,
    fitted_steps,
    remaining_power,
    restored,
    unclipped_codes,
)
from shortstack.prune.quantize.matrices import Matrix
from shortstack.prune.quantize.rate import MatrixRate, rate_of
from shortstack.prune.quantize.sensitivity import Sensitivity, no_numbers
from shortstack.prune.quantize.uniform import nearest_codes, stored_steps
from shortstack.row_codes import CODE_MAX, RowCodes, RowCodesWriter

Floats = NDArray[np.float32]
ROW_SHARE = 0.5
"""Exponent on how a row's sensitivity differs from its matrix's mean. At 1 steps are those of an
ideal coder of rows; rows of unlike spread cost a coder of whole matrices more, and few tokens
measure a row badly."""

LEAST_SHARE = 1e-3
"""Of the mean: no row or matrix counts as less sensitive, however seldom the text needs it."""

EMBEDDING_FLOOR, EMBEDDING_RANGE = 0.1, 4.0
"""Tokens that the text lacks may matter in another: of the mean, added to each; and by what factor
at most a row's step differs from the median."""


def layer_grams(model: LayerwiseModel, index: int, hidden: Sequence[Tensor]) -> dict[str, Tensor]:
    """E[x x^T] of the inputs x of each projection of a layer; those that share inputs share it."""
    return layer_moments(model, index, hidden)[0]


def layer_moments(
    model: LayerwiseModel,
    index: int,
    hidden: Sequence[Tensor],
    originals: Sequence[Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """E[x x^T] of the inputs x of each projection of a layer, (columns, columns); those that share
    inputs share it.

    `originals`: hidden states that the original model has where this one has `hidden`. Then also
    E[(x' - x) x^T] with x' the original's inputs, and the original's hidden states after the layer,
    which must not be rounded yet.
    """
    grams: dict[str, Tensor] = {}
    drifts: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    after: list[Tensor] = []
    for at, states in enumerate(hidden):
        reference: dict[str, Tensor] = {}
        if originals is not None:
            reference, output = _inputs(model, index, originals[at], shared)
            after.append(output)
        for name, x in _inputs(model, index, states, shared)[0].items():
            _add(grams, name, x.T @ x)
            if originals is not None:
                _add(drifts, name, (reference[name] - x).T @ x)
    n_tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    for total in (*grams.values(), *drifts.values()):
        total /= n_tokens
    return (
        {name: grams[first] for name, first in shared.items()},
        {name: drifts[first] for name, first in shared.items() if first in drifts},
        after,
    )


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    sums[name] = term if name not in sums else sums[name].add_(term)


def _inputs(
    model: LayerwiseModel, index: int, states: Tensor, shared: dict[str, str]
) -> tuple[dict[str, Tensor], Tensor]:
    """What the projections of a layer are given, (tokens, columns), once for those that share it,
    and what the layer gives. `shared` learns by whose name each projection's input goes."""
    seen: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    alive: list[Tensor] = []  # an id is only unique among what lives

    def note(name: str) -> Any:
        def add(module: Any, given: tuple[Tensor, ...]) -> None:
            shared[name] = seen.setdefault(id(given[0]), name)
            if shared[name] == name:
                found[name] = given[0].flatten(0, -2).float()
            alive.append(given[0])

        return add

    projections = model.projections(index).items()
    handles = [p.register_forward_pre_hook(note(name)) for name, p in projections]
    try:
        output = model.layer(index, states)
    finally:
        for handle in handles:
            handle.remove()
    return found, output


def importances(
    checkpoint: Checkpoint, model: LayerwiseModel, parts: Sequence[Tensor], found: Sensitivity
) -> dict[str, Tensor]:
    """Matrix name -> what a squared step in each row costs, (rows,): E[g_r^2] times the power that
    compensated rounding leaves."""
    family, made = checkpoint.family, dict[str, Tensor]()
    hidden = [model.embed(tokens) for tokens in parts]
    for index in range(model.n_layers):
        powers: dict[int, float] = {}
        for name, gram in layer_grams(model, index, hidden).items():
            full = family.layer_prefix.format(i=index) + name
            if id(gram) not in powers:
                powers[id(gram)] = remaining_power(_factor(full, gram)[1])
            made[full + ".weight"] = _tempered(found.outputs[full]) * powers[id(gram)]
        hidden = [model.layer(index, states) for states in hidden]
    at_head = found.head * remaining_power(_factor("the head", found.head_gram)[1])
    embedding = family.outer[0].hf
    if checkpoint.tied:
        made[embedding] = _bounded(at_head + found.lookup)
    else:
        made[embedding], made[family.head.hf] = _bounded(found.lookup), _bounded(at_head)
    least = LEAST_SHARE * float(torch.stack([rows.mean() for rows in made.values()]).median())
    return {name: rows.clamp_min(max(least, 1e-30)) for name, rows in made.items()}


def _factor(name: str, gram: Tensor) -> tuple[Tensor, Tensor]:
    """`factor_of`. Raises ShortstackError where inputs are no numbers, or too unlike in size."""
    try:
        order, upper = factor_of(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not in __all__
        raise no_numbers(f"the inputs of {name}") from None
    if not torch.isfinite(upper).all():
        raise no_numbers(f"the inputs of {name}")
    return order, upper


def _tempered(power: Tensor) -> Tensor:
    mean = power.mean().clamp_min(1e-30)
    return mean * (power / mean).clamp_min(LEAST_SHARE) ** ROW_SHARE


def _bounded(power: Tensor) -> Tensor:
    lifted = power + EMBEDDING_FLOOR * power.mean()
    middle = lifted.median()
    return lifted.clamp(middle / EMBEDDING_RANGE**2, middle * EMBEDDING_RANGE**2)


class Quantizer:
    """Writes codes as matrices are done, and gives the model their weights."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        steps: dict[str, Floats],
        writer: RowCodesWriter,
        rate_weight: float,
    ) -> None:
        self._matrices = {m.name: m for m in matrices}
        self._steps, self._writer, self._rate_weight = steps, writer, rate_weight
        self.rates: list[MatrixRate] = []

    def __call__(
        self, name: str, weight: Tensor, gram: Tensor | None, drift: Tensor | None = None
    ) -> None:
        """Round `weight`, (rows, columns), in place; without `gram` to the nearest code. `drift`:
        see `compensate.restored`."""
        matrix, peaks = self._matrices[name], self._matrices[name].peaks
        if gram is not None:
            order, upper = _factor(name, gram)
            if drift is not None:
                weight.copy_(restored(weight, gram, drift))
                peaks = weight.abs().amax(1).cpu().numpy()
        stored = stored_steps(self._steps[name], peaks, CODE_MAX)
        steps = torch.from_numpy(stored).to(weight.device)
        if gram is None:
            codes = torch.from_numpy(nearest_codes(weight.cpu().numpy(), stored, CODE_MAX))
        else:
            factor = order, upper
            codes, steps = unclipped_codes(weight, steps, *factor, CODE_MAX, self._rate_weight)
            steps = fitted_steps(weight, codes, steps, gram)
        half = steps.half()
        weight.copy_(codes.to(weight.device).float() * half.float()[:, None])
        made = RowCodes(codes.cpu().numpy(), half.cpu().numpy())
        self._writer.write(name, made)
        shape = (matrix.rows, matrix.columns)
        self.rates.append(rate_of(name, shape, made.codes, float(np.median(made.steps))))


def write_compensated(
    checkpoint: Checkpoint,
    model: LayerwiseModel,
    parts: Sequence[Tensor],
    head_gram: Tensor,
    matrices: Sequence[Matrix],
    steps: dict[str, Floats],
    out: Path,
    rate_weight: float,
    progress: OnProgress,
) -> list[MatrixRate]:
    """Write the sidecar of every matrix; `model` has the quantized weights afterwards."""
    family = checkpoint.family
    shapes = {m.name: (m.rows, m.columns) for m in matrices}
    with RowCodesWriter(out, shapes) as writer:
        rounded = Quantizer(matrices, steps, writer, rate_weight)
        originals = [model.embed(tokens) for tokens in parts]
        embedding = model.module.get_input_embeddings().weight
        rounded(family.outer[0].hf, embedding, head_gram if checkpoint.tied else None)
        hidden = [model.embed(tokens) for tokens in parts]
        for index in range(model.n_layers):
            grams, drifts, originals = layer_moments(model, index, hidden, originals)
            prefix = family.layer_prefix.format(i=index)
            for name, projection in model.projections(index).items():
                rounded(f"{prefix}{name}.weight", projection.weight, grams[name], drifts[name])
            hidden = [model.layer(index, states) for states in hidden]
            progress(index + 1, model.n_layers)
        if not checkpoint.tied:
            finals = [model.final(states).float() for states in hidden]
            gram = torch.stack([rows.T @ rows for rows in finals]).sum(0)
            rounded(family.head.hf, model.head()[0], gram / sum(map(len, finals)))
    return rounded.rates
