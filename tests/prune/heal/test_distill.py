"""Chunked losses are the plain ones: same number, same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shortstack.prune.heal import distill
from shortstack.prune.heal.distill import (
    Head,
    Top,
    divergence,
    mixed,
    next_token,
    summed_loss,
    top_divergence,
)

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


def top_of_teacher(k: int) -> Top:
    return Top.of(TEACHER.clone(), k, TEMPERATURE)


@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1])
def test_top_tokens_and_a_rest(k: int) -> None:
    """The plain loss over k + 1 outcomes, differentiated by autograd, is what ours says."""
    top = top_of_teacher(k)
    p = (TEACHER / TEMPERATURE).softmax(-1)
    torch.testing.assert_close(top.log_p.exp(), p.gather(1, top.ids))
    torch.testing.assert_close(top.log_p.exp().sum(-1) + top.log_rest.exp(), torch.ones(POSITIONS))

    def plain(logits: Tensor) -> Tensor:
        q = (logits / TEMPERATURE).softmax(-1)
        on_top = q.gather(1, top.ids)
        joined = torch.cat([on_top, q.scatter(1, top.ids, 0.0).sum(-1, keepdim=True)], -1)
        wanted = torch.cat([top.log_p, top.log_rest[:, None]], -1).exp()
        return TEMPERATURE**2 * (wanted * (wanted.log() - joined.log())).sum()

    hidden = numbers(2, POSITIONS, WIDTH).requires_grad_()
    weight = numbers(3, VOCABULARY, WIDTH).requires_grad_()
    other, also = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = summed_loss(hidden, Head(weight), top_divergence(lambda rows: top[rows], TEMPERATURE))
    expected = plain(functional.linear(other, also))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight.grad, also.grad, rtol=1e-3, atol=1e-4)


def test_fewer_outcomes_never_diverge_more() -> None:
    hidden, head = numbers(2, POSITIONS, WIDTH), Head(numbers(3, VOCABULARY, WIDTH))
    losses = [
        summed_loss(hidden, head, top_divergence(top_of_teacher(k).__getitem__, TEMPERATURE)).item()
        for k in (1, 4, 32, VOCABULARY - 1)
    ]
    whole = summed_loss(hidden, head, KL).item()
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(whole, rel=1e-4)
    assert losses[0] < 0.9 * whole
