"""The losses of healing: hidden states in, one number out. Logits exist for a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Of one chunk of logits in float32; about four such buffers live at once."""


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits: cap * tanh(scale * (weight @ h + bias) / cap)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(positions, width) to float32 (positions, vocabulary)."""
        return self.shaped(functional.linear(hidden, self.weight, self.bias))

    def shaped(self, product: Tensor) -> Tensor:
        """Scale and cap of `weight @ h + bias`, as float32."""
        logits = product.float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits

    def gradient(self, logits: Tensor, upstream: Tensor) -> Tensor:
        """Of the bare product, from that of `logits`; changes `upstream`."""
        if self.cap:
            upstream.mul_(1 - (logits / self.cap).square_())
        return upstream.mul_(self.scale) if self.scale != 1.0 else upstream


Chunk = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Positions and their student logits to (sum of the loss, its gradient in the logits). The logits
may be overwritten."""


def next_token(targets: Tensor) -> Chunk:
    """Cross entropy -log q[target]; its gradient is q - onehot(target)."""

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.log_softmax(-1)
        wanted = targets[rows, None]
        loss = -log_q.gather(1, wanted).sum()
        gradient = log_q.exp_()
        gradient.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=gradient.dtype))
        return loss, gradient

    return chunk


def divergence(teacher: Callable[[slice], Tensor], temperature: float = 1.0) -> Chunk:
    """T^2 KL(p || q), p and q the softmax of teacher's and student's logits over T.

    Hinton et al. (arXiv:1503.02531, section 2): T^2 keeps the gradient's size; it is T (q - p).
    """

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (teacher(rows) / temperature).log_softmax(-1)
        log_q = (logits / temperature).log_softmax(-1)
        p = log_p.exp()
        loss = temperature**2 * (p * log_p.sub_(log_q)).sum()
        return loss, log_q.exp_().sub_(p).mul_(temperature)

    return chunk


@dataclass(frozen=True)
class Top:
    """A teacher's k likeliest tokens at each position, and how likely all others are together.

    `ids` and `log_p` are (positions, k), `log_rest` (positions,): natural logarithms of
    probabilities at the temperature of the loss, which sum to 1 with the rest.
    """

    ids: Tensor
    log_p: Tensor
    log_rest: Tensor

    def __getitem__(self, rows: slice) -> Top:
        return Top(self.ids[rows], self.log_p[rows], self.log_rest[rows])

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> Top:
        """From logits (positions, vocabulary); k below the vocabulary, or there is no rest."""
        scaled = logits / temperature
        total = scaled.logsumexp(-1)
        highest, ids = scaled.topk(k, -1)
        rest = scaled.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        return cls(ids, highest - total[:, None], rest - total)


def top_divergence(teacher: Callable[[slice], Top], temperature: float = 1.0) -> Chunk:
    """T^2 KL over k + 1 outcomes: the teacher's k likeliest tokens K, and any other token.

    KL = sum_(i in K) p_i log(p_i / q_i) + p_rest log(p_rest / q_rest), q_rest = 1 - sum_K q_i: a
    lower bound of the whole KL (outcomes are joined), that is 0 only if q agrees on K. The gradient
    in the logits is T (q - r), r = p on K, and p_rest q_j / q_rest for any other token j.
    """

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        top = teacher(rows)
        scaled = logits / temperature
        total = scaled.logsumexp(-1, keepdim=True)
        log_q = scaled.gather(-1, top.ids) - total
        gradient = (scaled - total).exp_()
        log_rest = scaled.scatter_(-1, top.ids, -torch.inf).logsumexp(-1) - total[:, 0]
        p, rest = top.log_p.exp(), top.log_rest.exp()
        loss = (p * (top.log_p - log_q)).sum() + (rest * (top.log_rest - log_rest)).sum()
        on_top = gradient.gather(-1, top.ids) - p
        gradient.mul_(1 - (top.log_rest - log_rest).exp()[:, None])
        gradient.scatter_(-1, top.ids, on_top)
        return temperature**2 * loss, gradient.mul_(temperature)

    return chunk


def mixed(first: Chunk, second: Chunk, alpha: float) -> Chunk:
    """alpha * first + (1 - alpha) * second."""

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        a, grad_a = first(rows, logits)
        b, grad_b = second(rows, logits)
        return alpha * a + (1 - alpha) * b, grad_a.mul_(alpha).add_(grad_b, alpha=1 - alpha)

    return chunk


def summed_loss(hidden: Tensor, head: Head, chunk: Chunk) -> Tensor:
    """Sum of a loss over positions; gradients reach `hidden` (positions, width) and the head.

    Both are computed in the forward pass, chunk by chunk, so that no logits are kept for the
    backward pass: memory grows with a chunk, not with positions times vocabulary.
    """
    result: Tensor = _Chunked.apply(hidden, head.weight, head.bias, head, chunk)  # type: ignore[no-untyped-call]
    return result


def chunk_rows(head: Head) -> int:
    """Positions whose logits fit in a chunk."""
    budget = CHUNK_BYTES.get(head.weight.device.type, CHUNK_BYTES["cuda"])
    return max(1, budget // (4 * len(head.weight)))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, chunk: Chunk
    ) -> Tensor:
        wants = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(hidden), chunk_rows(head)):
            rows = slice(start, min(len(hidden), start + chunk_rows(head)))
            product = functional.linear(hidden[rows], weight, bias)
            logits = head.shaped(product)
            # a chunk may overwrite the logits; the cap's derivative needs them
            loss, gradient = chunk(rows, logits.clone() if head.cap else logits)
            total += loss
            # products in the type of the forward pass: float32, or bfloat16 under autocast
            gradient = head.gradient(logits, gradient).to(product.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.matmul(gradient, weight.to(gradient.dtype))
            if grad_weight is not None:
                grad_weight += torch.matmul(gradient.T, hidden[rows].to(gradient.dtype))
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)
