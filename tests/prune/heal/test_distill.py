"""Chunked losses are the plain ones: same number, same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shortstack.prune.heal import distill
from shortstack.prune.heal.distill import Head, divergence, mixed, next_token, summed_loss

POSITIONS, WIDTH, VOCABULARY, TEMPERATURE = 23, 16, 97, 2.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five positions a chunk, the last one shorter."""
    monkeypatch.setitem(distill.CHUNK_BYTES, "cpu", 5 * 4 * VOCABULARY)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = functional.linear(hidden, head.weight, head.bias) * head.scale
    return torch.tanh(logits / head.cap) * head.cap if head.cap else logits


def plain_kl(teacher: Tensor, logits: Tensor) -> Tensor:
    return TEMPERATURE**2 * functional.kl_div(
        (logits / TEMPERATURE).log_softmax(-1),
        (teacher / TEMPERATURE).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )


TEACHER = 3 * numbers(1, POSITIONS, VOCABULARY)
TARGETS = torch.arange(POSITIONS) * 4
KL = divergence(lambda rows: TEACHER[rows], TEMPERATURE)
CE = next_token(TARGETS)


@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"cap": 2.0, "scale": 1.5}])
@pytest.mark.parametrize(
    ("chunk", "plain"),
    [
        (KL, lambda z: plain_kl(TEACHER, z)),
        (CE, lambda z: functional.cross_entropy(z, TARGETS, reduction="sum")),
        (
            mixed(KL, CE, 0.25),
            lambda z: (
                0.25 * plain_kl(TEACHER, z)
                + 0.75 * functional.cross_entropy(z, TARGETS, reduction="sum")
            ),
        ),
    ],
    ids=["kl", "ce", "mix"],
)
def test_loss_and_gradients(
    chunk: distill.Chunk, plain: Callable[[Tensor], Tensor], extra: dict[str, float]
) -> None:
    results = []
    for ours in (True, False):
        hidden = numbers(2, POSITIONS, WIDTH).requires_grad_()
        weight = numbers(3, VOCABULARY, WIDTH).requires_grad_()
        bias = numbers(4, VOCABULARY).requires_grad_()
        head = Head(weight, bias, **extra)
        loss = summed_loss(hidden, head, chunk) if ours else plain(plain_logits(hidden, head))
        (loss / POSITIONS).backward()
        results.append([loss, hidden.grad, weight.grad, bias.grad])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = numbers(2, POSITIONS, WIDTH).requires_grad_(), numbers(3, VOCABULARY, WIDTH)
    summed_loss(hidden, Head(weight), CE).backward()
    assert hidden.grad is not None
    assert weight.grad is None
