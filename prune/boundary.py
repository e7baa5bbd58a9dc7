"""Cheap repairs where a cut ends, in closed form: for scoring cuts, nothing is written.

A repair is fitted to X, the states that arrive behind a cut, and Z, the whole model's states at
that place, both (tokens, width), and maps states (..., width) to states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shortstack.errors import unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Repair = Callable[["Tensor"], "Tensor"]
Fit = Callable[["Tensor", "Tensor"], Repair]

RIDGE = 0.03
"""Share of the mean variance of X that the linear repair's ridge adds to each direction."""


def nothing(arriving: Tensor, wanted: Tensor) -> Repair:
    """No repair: the states pass."""
    return lambda states: states


def mean_bias(arriving: Tensor, wanted: Tensor) -> Repair:
    """x + E[Z - X], the "emulated update" of Siddiqui et al. (arXiv:2407.16286)."""
    bias = (wanted - arriving).double().mean(0)
    return lambda states: (states.double() + bias).to(states.dtype)


def scale(arriving: Tensor, wanted: Tensor) -> Repair:
    """x * E|Z| / E|X|, with the norms of the tokens: Prune&Comp (arXiv:2507.18212)."""
    factor = wanted.double().norm(dim=-1).mean() / arriving.double().norm(dim=-1).mean()
    return lambda states: (states.double() * factor).to(states.dtype)


def linear(arriving: Tensor, wanted: Tensor) -> Repair:
    """x + x W + b by ridge least squares, as Ghosted Layers (arXiv:2605.15491) with a bias.

    W = (X'X + r I)^-1 X'(Z - X) of centred X and Z - X, in float64, with r = RIDGE * tr(X'X) /
    width: few tokens must not look better than many.
    """
    import torch

    rows, gaps = arriving.double(), (wanted - arriving).double()
    centre, bias = rows.mean(0), gaps.mean(0)
    rows = rows - centre
    gram = rows.T @ rows
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    gram.diagonal().add_(ridge)
    weight = torch.linalg.solve(gram, rows.T @ (gaps - bias))
    return lambda states: (states.double() + (states.double() - centre) @ weight + bias).to(
        states.dtype
    )


REPAIRS: dict[str, Fit] = {
    "none": nothing,
    "bias": mean_bias,
    "scale": scale,
    "linear": linear,
}
"""Name -> how it is fitted. A new one: a function and a line here."""


def repair_named(name: str) -> Fit:
    if name not in REPAIRS:
        raise unknown("repair", name, REPAIRS)
    return REPAIRS[name]


def fitted(fit: Fit, arriving: Sequence[Tensor], wanted: Sequence[Tensor]) -> Repair:
    """Fit to all batches, each (windows, length, width), in float32.

    The first token of a window is left out: attention parks its surplus there, with norms
    hundreds of times the others', which would be all that a mean sees.
    """
    return fit(_rows(arriving), _rows(wanted))


def crossed(fit: Fit, arriving: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Mend each half of the windows as the other half says, so that a repair with many numbers
    cannot flatter itself on the text it was fitted to. A single window mends itself."""
    import torch

    all_arriving, all_wanted = torch.cat(list(arriving)), torch.cat(list(wanted))
    if len(all_arriving) == 1:
        return [fitted(fit, arriving, wanted)(all_arriving)]
    mended = torch.empty_like(all_arriving)
    for mine, others in ((0, 1), (1, 0)):
        repair = fitted(fit, [all_arriving[others::2]], [all_wanted[others::2]])
        mended[mine::2] = repair(all_arriving[mine::2])
    return list(mended.split([len(batch) for batch in arriving]))


def _rows(batches: Sequence[Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([batch[:, 1:].float().flatten(0, 1) for batch in batches])
