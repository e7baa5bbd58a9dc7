from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from shortstack.prune import scoring


def test_influence_of_a_layer_that_only_stretches_is_zero() -> None:
    inputs = torch.randn(2, 5, 8)
    assert scoring.block_influence(inputs, 3 * inputs).item() == pytest.approx(0, abs=1e-5)


def test_influence_of_a_reversing_layer_is_two_a_token() -> None:
    inputs = torch.randn(2, 5, 8)
    assert scoring.block_influence(inputs, -inputs).item() == pytest.approx(20)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 3), (300, 5000), (256, 4096)])
def test_chunked_likelihood_is_cross_entropy(positions: int, vocabulary: int, bias: bool) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(positions, 16), torch.randn(vocabulary, 16)
    offset = torch.randn(vocabulary) if bias else None
    targets = torch.randint(0, vocabulary, (positions,))
    logits = functional.linear(hidden, head, offset)
    expected = functional.cross_entropy(logits, targets, reduction="sum").item()
    found = scoring.negative_log_likelihood(hidden, head, targets, offset)
    assert found == pytest.approx(expected, rel=1e-6)


def test_scaled_and_capped_logits_count() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 16), torch.randn(5000, 16)
    targets = torch.randint(0, 5000, (300,))
    logits = 2.0 * torch.tanh(functional.linear(hidden, head) * 0.25 / 2.0)
    expected = functional.cross_entropy(logits, targets, reduction="sum").item()
    found = scoring.negative_log_likelihood(hidden, head, targets, scale=0.25, cap=2.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_lowest_skips_what_has_no_score_and_breaks_ties_to_the_left() -> None:
    assert scoring.lowest([None, 0.5, 0.1, 0.5, 0.9], 2) == (1, 2)


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert scoring.perplexity(math.log(7)) == pytest.approx(7)
    assert scoring.perplexity(1000) == math.inf


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, 2.0)])
@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 3), (300, 5000), (256, 4096)])
def test_chunked_divergence_is_kl_div(
    positions: int, vocabulary: int, scale: float, cap: float | None
) -> None:
    torch.manual_seed(0)
    head, bias = torch.randn(vocabulary, 16), torch.randn(vocabulary)
    reference, *others = torch.randn(3, positions, 16)

    def log_chances(hidden: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, head, bias) * scale
        return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)

    expected = [
        functional.kl_div(
            log_chances(other), log_chances(reference), log_target=True, reduction="sum"
        ).item()
        for other in others
    ]
    found = scoring.kl_divergences(reference, others, head, bias, scale=scale, cap=cap)
    assert found == pytest.approx(expected, rel=1e-5)
    assert scoring.kl_divergences(reference, [reference], head)[0] == pytest.approx(0, abs=1e-3)


def test_angles_are_shares_of_half_a_turn() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    distances = scoring.angular_distance(torch.stack([one] * 3), torch.stack([one, other, -one]))
    assert distances.tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


def test_merged_layers_can_be_merged_again() -> None:
    once = scoring.merged_weights({2: 1.0}, [{3: 1.0}, {4: 1.0}])
    assert once == {2: -1.0, 3: 1.0, 4: 1.0}
    assert scoring.merged_weights({1: 1.0}, [once]) == once  # theta_1 + (theta - theta_1)
    assert scoring.merged_weights({1: 1.0}, [{2: 1.0}, once]) == {1: -1.0, 3: 1.0, 4: 1.0}
