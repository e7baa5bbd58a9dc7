"""The numbers behind the planners: arrays in, numbers out. Nothing of ours is imported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

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


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Angular distance of hidden states (Gromov et al., arXiv:2403.17887).

    d = (1 / pi) arccos( x . y / (|x| |y|) ), 0 for one direction, 1 for opposite ones. `before` and
    `after` have shape (..., hidden); the result has shape (...), float64.
    """
    cosines = functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return cosines.clamp(-1, 1).arccos() / math.pi


def taylor_importance(weights: Iterable[Tensor], gradients: Iterable[Tensor]) -> float:
    """First-order importance of a block: sum of |w * dL/dw| over its weight matrices.

    Shortened LLaMA (arXiv:2402.02834), its score "Taylor". In nats a token if L is.
    """
    pairs = zip(weights, gradients, strict=True)
    return sum((weight * gradient).abs().double().sum().item() for weight, gradient in pairs)


def merged_weights(
    first: Mapping[int, float], others: Sequence[Mapping[int, float]]
) -> dict[int, float]:
    """LaCo's merge of several layers into the first (arXiv:2402.11187, rule RDSC).

    theta* = theta_l + sum_k (theta_(l+k) - theta_l). Each layer is given, and the result, as
    weights of the original's layers, so that merged layers can be merged again. (The official
    notebooks subtract the running theta*, which leaves nothing but the last theta_(l+k).)
    """
    total = {source: (1 - len(others)) * weight for source, weight in first.items()}
    for other in others:
        for source, weight in other.items():
            total[source] = total.get(source, 0.0) + weight
    return {source: weight for source, weight in sorted(total.items()) if weight}


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
            logits = _logits(rows, head, bias, start, scale, cap)
            column = (wanted - start).clamp(0, logits.shape[1] - 1)
            here = column == wanted - start
            picked = torch.where(here, logits.gather(1, column[:, None])[:, 0], picked)
            log_sums.append(_log_sum(logits))
        total += (torch.stack(log_sums).logsumexp(0) - picked).double().sum().item()
    return total


def kl_divergences(
    reference: Tensor,
    others: Sequence[Tensor],
    head: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> list[float]:
    """KL(p || q) of the next-token distributions, summed over positions, for each q, in nats.

    p = softmax(head @ reference), q = softmax(head @ other); all (positions, width), `head`
    (vocabulary, width), logits shaped as for the likelihood. With t and s the logits of p and q:
    KL = E_p[t - s] - log sum exp t + log sum exp s. The logits exist only in chunks, those of the
    reference once for all others: E_p is summed under a running maximum of t.
    """
    totals = [0.0] * len(others)
    for begin in range(0, len(reference), TOKEN_CHUNK):
        rows = reference[begin : begin + TOKEN_CHUNK]
        highest = torch.full((len(rows),), -math.inf)
        mass, gaps = torch.zeros(len(rows)), torch.zeros(len(others), len(rows))
        log_sums: list[list[Tensor]] = [[] for _ in others]
        for start in range(0, len(head), VOCAB_CHUNK):
            wanted = _logits(rows, head, bias, start, scale, cap)
            before, highest = highest, torch.maximum(highest, wanted.amax(-1))
            chances = (wanted - highest[:, None]).exp_()
            fade = (before - highest).exp_()
            mass = mass * fade + chances.sum(-1)
            gaps = gaps * fade
            for at, other in enumerate(others):
                part = other[begin : begin + TOKEN_CHUNK]
                logits = _logits(part, head, bias, start, scale, cap)
                gaps[at] += torch.einsum("tv,tv->t", chances, wanted - logits)
                log_sums[at].append(_log_sum(logits))
        own = mass.log() + highest
        for at, parts in enumerate(log_sums):
            terms = gaps[at] / mass - own + torch.stack(parts).logsumexp(0)
            totals[at] += terms.double().sum().item()
    return totals


def _logits(
    rows: Tensor, head: Tensor, bias: Tensor | None, start: int, scale: float, cap: float | None
) -> Tensor:
    """One chunk of the vocabulary, float32, a fresh tensor."""
    part = head[start : start + VOCAB_CHUNK]
    part_bias = None if bias is None else bias[start : start + VOCAB_CHUNK]
    logits = functional.linear(rows, part, part_bias).float().mul_(scale)
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _log_sum(logits: Tensor) -> Tensor:
    """log sum exp of each row; the logits are spent."""
    highest = logits.amax(-1)
    # In place: a fresh buffer for each step would cost more than the exponentials.
    return highest + logits.sub_(highest[:, None]).exp_().sum(-1).log()


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
