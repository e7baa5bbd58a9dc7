"""The numbers behind the planners: arrays in, numbers out. Nothing of ours is imported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

TOKEN_CHUNK, VOCAB_CHUNK = 256, 2048
"""A chunk of logits is 2 MiB in fp32: it stays in the cache between the product and the sum."""


def block_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Block Influence of a layer, summed over tokens (ShortGPT, arXiv:2403.03853, equation 1).

    BI = 1 - E_t [ x_t . y_t / (|x_t| |y_t|) ] with x_t the hidden state before the layer and y_t
    the one after it. `inputs` and `outputs` have shape (..., tokens, hidden), any float type; the
    result is the sum of the terms as a float64 scalar, 0 for a layer that changes no direction.
    """
    cosines = functional.cosine_similarity(inputs.float(), outputs.float(), dim=-1)
    return (1 - cosines.double()).sum()


def negative_log_likelihood(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> float:
    """Sum of -log softmax(head @ h)[target] over all positions, in nats.

    `hidden` is (positions, width), `head` (vocabulary, width), `targets` (positions,). The same
    number as cross_entropy(linear(hidden, head).float(), targets, reduction="sum"), but the
    logits exist only in chunks: log sum exp over the vocabulary is the log sum exp of the chunks'.
    Logits are multiplied by `scale` and then softly capped: cap * tanh(logit / cap).
    """
    total = 0.0
    for rows, wanted in zip(hidden.split(TOKEN_CHUNK), targets.split(TOKEN_CHUNK), strict=True):
        log_sums, picked = [], torch.zeros(len(rows))
        for start in range(0, len(head), VOCAB_CHUNK):
            part = head[start : start + VOCAB_CHUNK]
            part_bias = None if bias is None else bias[start : start + VOCAB_CHUNK]
            logits = functional.linear(rows, part, part_bias).float().mul_(scale)
            if cap:
                logits = logits.div_(cap).tanh_().mul_(cap)
            column = (wanted - start).clamp(0, len(part) - 1)
            here = column == wanted - start
            picked = torch.where(here, logits.gather(1, column[:, None])[:, 0], picked)
            highest = logits.amax(-1)
            # In place: a fresh buffer for each step would cost more than the exponentials.
            sums = logits.sub_(highest[:, None]).exp_().sum(-1)
            log_sums.append(highest + sums.log())
        total += (torch.stack(log_sums).logsumexp(0) - picked).double().sum().item()
    return total


def lowest(scores: Sequence[float | None], count: int) -> tuple[int, ...]:
    """Positions of the `count` lowest scores, in order; None never counts, ties go to the left."""
    known = [(score, index) for index, score in enumerate(scores) if score is not None]
    return tuple(sorted(index for _, index in sorted(known)[:count]))


def suffix_evaluations(n_layers: int, candidates: Iterable[int]) -> int:
    """Layer evaluations of leave-one-out with shared prefixes.

    The whole model once, and for each dropped layer only the layers above it.
    """
    return n_layers + sum(n_layers - 1 - index for index in candidates)


def perplexity(nats_per_token: float) -> float:
    """exp of the mean negative log likelihood; infinite rather than an overflow."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
