"""Run many cuts of one model together: whatever they have in common below is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortstack.families.table import PARTS, Part

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.calibrate import LayerwiseModel

Cut = frozenset[tuple[int, Part]]
"""What is gone from a model: sub-blocks by layer. A dropped layer is both of its sub-blocks."""

Mend = Callable[[int, list["Tensor"]], list["Tensor"]]
"""Repairs the states of all batches that enter a layer (or the final norm), where a cut ends."""


def whole(*layers: int) -> Cut:
    """The cut that drops these layers."""
    return frozenset((layer, part) for layer in layers for part in PARTS)


@dataclass(frozen=True)
class _Branch:
    """Cuts that are alike so far, and their hidden states, one tensor a batch."""

    states: list[Tensor]
    members: list[int]
    open: bool = False
    """Something is gone since the states were last mended."""


def climb(
    model: LayerwiseModel,
    parts: Sequence[Tensor],
    cuts: Sequence[Cut],
    *,
    mend: Mend | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[list[Tensor]]:
    """What the last layer gives under each cut, one tensor for each batch of `parts`.

    Cuts that are alike below a layer share one evaluation of it. Layer by layer, not cut by cut:
    a layer's weights stay in the cache. `step` is called after each evaluation of a layer.
    """
    embedded = [model.embed(tokens) for tokens in parts]
    branches = [_Branch(embedded, list(range(len(cuts))))]
    for index in range(model.n_layers):
        grown = []
        for branch in branches:
            grown += _grow(model, index, branch, cuts, mend, step)
        branches = grown
    ends: dict[int, list[Tensor]] = {}
    for branch in branches:
        at_end = branch.open and mend is not None
        states = mend(model.n_layers, branch.states) if at_end and mend else branch.states
        ends |= dict.fromkeys(branch.members, states)
    return [ends[member] for member in range(len(cuts))]


def _grow(
    model: LayerwiseModel,
    index: int,
    branch: _Branch,
    cuts: Sequence[Cut],
    mend: Mend | None,
    step: Callable[[], None],
) -> list[_Branch]:
    """One layer further: a branch for each way in which the cuts treat that layer."""
    mended: list[Tensor] | None = None if branch.open and mend else branch.states
    grown = []
    for gone, members in _by_parts(index, branch.members, cuts):
        if len(gone) == len(PARTS):
            grown.append(_Branch(branch.states, members, open=True))
            continue
        if mended is None:
            assert mend is not None
            mended = mend(index, branch.states)
        states = []
        for hidden in mended:
            states.append(model.layer(index, hidden, gone))
            step()
        grown.append(_Branch(states, members, open=bool(gone)))
    return grown


def _by_parts(
    index: int, members: Iterable[int], cuts: Sequence[Cut]
) -> list[tuple[tuple[Part, ...], list[int]]]:
    groups: dict[tuple[Part, ...], list[int]] = {}
    for member in members:
        gone = tuple(part for part in PARTS if (index, part) in cuts[member])
        groups.setdefault(gone, []).append(member)
    return list(groups.items())
