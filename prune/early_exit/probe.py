"""A check that costs almost nothing: a linear map from a state to the answers' logits."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortstack.early_exit.numbers import unit

RIDGE = 0.1
"""Share of the states' mean variance that the ridge adds to each direction."""


def fit_probe(hidden: Tensor, logits: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ridge least squares to the whole model's centred logits, one map for each check.

    With x = unit(state) centred and y = logits less their mean over the answers: W = (X'X + r n
    tr(X'X)/(n d) I)^-1 X'y in float64, by its dual form X'(XX' + ...)^-1 y where there are fewer
    rows than dimensions. `hidden` (rows, checks, width), `logits` (rows, answers), all finite.
    Returns (checks, answers, width) and (checks, answers).
    """
    wanted = logits.double() - logits.double().mean(-1, keepdim=True)
    mean = wanted.mean(0)
    maps, biases = [], []
    for check in range(hidden.shape[1]):
        states = unit(hidden[:, check]).double()
        centre = states.mean(0)
        weight = _ridge(states - centre, wanted - mean)
        maps.append(weight.T)
        biases.append(mean - centre @ weight)
    return torch.stack(maps).float().numpy(), torch.stack(biases).float().numpy()


def _ridge(inputs: Tensor, wanted: Tensor) -> Tensor:
    rows, width = inputs.shape
    least = RIDGE * inputs.square().sum() / width + torch.finfo(inputs.dtype).tiny
    dual = rows < width
    gram = inputs @ inputs.T if dual else inputs.T @ inputs
    gram.diagonal().add_(least)
    found: Tensor = torch.linalg.solve(gram, wanted if dual else inputs.T @ wanted)
    return inputs.T @ found if dual else found
