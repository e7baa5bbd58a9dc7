"""KL of several exits to one model, logits a chunk at a time: the model's once for all exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.prune.heal.distill import Head, chunk_rows

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def teacher_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p = softmax(t) and sum_v p log p of each row, float32, from logits (rows, vocabulary)."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    return p, (p * log_p).sum(-1)


def student_rows(logits: Tensor, p: Tensor, negative_entropy: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(z)) summed over rows, and its gradient in z, q - p, in the type of z.

    KL = sum p log p - sum p z + log sum exp z: no logarithm of q is ever stored.
    """
    z = logits.float()
    total = z.logsumexp(-1)
    loss = (negative_entropy + total - (p * z).sum(-1)).sum()
    return loss, ((z - total[:, None]).exp() - p).to(logits.dtype)


def joint_divergence(
    hidden: Sequence[Tensor],
    teacher: Tensor,
    head: Head,
    kernels: tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Kernel] = (
        teacher_rows,
        student_rows,
    ),
) -> Tensor:
    """KL(model || exit) summed over positions, one number an exit, float32.

    `hidden` are the exits' states after their norms and `teacher` the model's, each (positions,
    width); gradients reach `hidden` alone, computed in the forward pass so that no logits outlive
    their chunk. `kernels`: the functions above, or the same compiled.
    """
    result: Tensor = _Joint.apply(head, teacher, kernels, *hidden)  # type: ignore[no-untyped-call]
    return result


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, teacher: Tensor, kernels: Any, *hidden: Tensor) -> Tensor:
        of_teacher, of_student = kernels
        plain = head.scale == 1.0 and not head.cap
        sums = torch.zeros(len(hidden), dtype=torch.float32, device=teacher.device)
        gradients = [torch.empty_like(states) for states in hidden]
        for start in range(0, len(teacher), chunk_rows(head)):
            rows = slice(start, min(len(teacher), start + chunk_rows(head)))
            product = functional.linear(teacher[rows], head.weight, head.bias)
            p, entropy = of_teacher(product if plain else head.shaped(product))
            for at, states in enumerate(hidden):
                product = functional.linear(states[rows], head.weight, head.bias)
                kind, logits = product.dtype, product if plain else head.shaped(product)
                loss, gradient = of_student(logits, p, entropy)
                sums[at] += loss
                if not plain:
                    gradient = head.gradient(logits, gradient).to(kind)
                gradients[at][rows] = torch.matmul(gradient, head.weight.to(kind))
        ctx.save_for_backward(*gradients)
        return sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        parts = zip(ctx.saved_tensors, upstream, strict=True)
        return (None, None, None, *((grad * scale).to(grad.dtype) for grad, scale in parts))
