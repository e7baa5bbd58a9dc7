"""What a check computes: tensors in, tensors out. Nothing of ours is imported."""

from __future__ import annotations

import torch
from torch import Tensor


def probability_features(logits: Tensor) -> Tensor:
    """(top, gap, margin) of each row of logits (rows, answers), as shape (rows, 3), float32.

    AdaInfer (arXiv:2403.02181): top = the highest probability, gap = the highest less the second;
    margin = the same gap in logits. An answer that a row has not got is -inf.
    """
    two = logits.float().topk(2, dim=-1).values
    # of a softmax only two entries are wanted: exp(z - log sum exp z)
    likely = (two - logits.float().logsumexp(-1, keepdim=True)).exp()
    top, gap = likely[:, 0], likely[:, 0] - likely[:, 1]
    return torch.stack([top, gap, two[:, 0] - two[:, 1]], dim=-1)


def unit(hidden: Tensor) -> Tensor:
    """Rows of states over their root mean square, float32: what a norm without weights gives."""
    states = hidden.float()
    return states * states.square().mean(-1, keepdim=True).rsqrt()


def scores(features: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """A linear classifier's decision values: features (rows, n) @ weights (n,) + bias."""
    return features @ weights + bias
