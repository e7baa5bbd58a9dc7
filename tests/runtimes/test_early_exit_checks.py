"""A check of one prompt alone decides what a check of many does, in fewer calls."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.early_exits import opened, prompts_of
from tests.runtimes.test_pytorch_early_exit import everywhere
from torch.utils._python_dispatch import TorchDispatchMode

from shortstack.early_exit.checks import NOT_ONE, ON_HOST, Checks, ModelHead
from shortstack.early_exit.numbers import probability_features
from shortstack.early_exit.row import row_features
from shortstack.early_exit.rule import ANSWERS, PROBE, VOCABULARY
from shortstack.runtimes.pytorch_early_exit import Answerer


def test_features_of_one_row_are_those_of_many() -> None:
    logits = torch.tensor([[0.3, 2.0, -1.0], [5.0, 5.0, -math.inf], [-80.0, 90.0, 1.0]])
    for one, wanted in zip(logits.tolist(), probability_features(logits), strict=True):
        assert np.allclose(row_features(one), wanted.numpy(), atol=1e-6)


def test_no_row_leaves_on_what_is_no_number() -> None:
    for logits in itertools.permutations([5.0, math.nan, 800.0]):
        assert all(map(math.isnan, row_features(logits)))


@pytest.mark.parametrize("check", [ANSWERS, PROBE, VOCABULARY])
def test_a_row_alone_is_decided_as_among_others(tiny: Path, check: str) -> None:
    model = opened(tiny)
    checks, width = Checks(everywhere(tiny, check), ModelHead(model)), model.config.hidden_size
    rows = checks.head.rows(torch.tensor([[3, 7]] * 6))
    states = torch.randn((6, width), generator=torch.manual_seed(0))
    with torch.inference_mode():
        scores, chosen = checks.of_answers(1, states, rows)
        alone = [checks.decide(1, state[None], rows)[0] for state in states]
    assert np.allclose([score for score, _ in alone], scores.numpy(), atol=1e-5)
    assert [answer for _, answer in alone] == chosen.tolist()
    assert len(set(chosen.tolist())) == 2


class Counted(TorchDispatchMode):
    """Counts the operations on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not annotated it
        self.n = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("check", [ANSWERS, PROBE])
def test_a_row_alone_saves_a_dozen_calls(tiny: Path, check: str) -> None:
    model = opened(tiny)
    checks, width = Checks(everywhere(tiny, check), ModelHead(model)), model.config.hidden_size
    rows = checks.head.rows(torch.tensor([[3, 7]]))
    states = torch.ones((1, width))
    with torch.inference_mode(), Counted() as one:
        checks.decide(1, states, rows)
    with torch.inference_mode(), Counted() as many:
        checks.of_answers(1, states, rows)
    assert 0 < one.n <= many.n - 12


def test_rows_of_the_head_are_read_again_for_other_answers(tiny: Path) -> None:
    model = opened(tiny)
    head = ModelHead(model)
    first = head.rows(torch.tensor([[3, 7], [3, 7]]))
    assert head.rows(torch.tensor([[3, 7]])) is first
    weight, _, absent = head.rows(torch.tensor([[3, NOT_ONE], [3, 8]]))
    assert torch.equal(weight[1, 1], model.get_output_embeddings().weight[8])
    assert absent is not None
    assert absent.tolist() == [[False, True], [False, False]]
    assert torch.equal(head.rows(torch.tensor([[3, 7]]))[0], first[0])


def test_many_states_are_normed_where_they_lie(tiny: Path) -> None:
    """To the same numbers."""
    model = opened(tiny)
    head, width = ModelHead(model), model.config.hidden_size
    states = torch.randn((ON_HOST // width + 1, width))
    few = torch.cat([head.normed_nearby(part) for part in states.split(8)])
    assert torch.allclose(head.normed_nearby(states), few, atol=1e-6)


def test_the_decoder_ends_where_all_have_left(tiny: Path) -> None:
    """Not even its last norm is run, and the model is as it was."""
    model, prompts = opened(tiny), prompts_of(tiny, 8)
    ran: list[int] = []
    model.get_decoder().norm.register_forward_hook(lambda *given: ran.append(1))
    rule = everywhere(tiny, PROBE)
    leaving = Answerer(model, dataclasses.replace(rule, threshold=-math.inf))
    assert {answer.n_layers for answer in leaving.answer(prompts, batch_tokens=10_000)} == {1}
    assert not ran
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)
    assert {answer.n_layers for answer in Answerer(model).answer(prompts)} == {6}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no card")
@pytest.mark.parametrize("check", [ANSWERS, PROBE, VOCABULARY])
def test_a_card_answers_as_the_cpu(tiny: Path, check: str) -> None:
    rule, prompts = everywhere(tiny, check), prompts_of(tiny, 24, seed=3)
    wanted = Answerer(opened(tiny), rule).answer(prompts)
    card = Answerer(opened(tiny).to("cuda:0"), rule)
    assert card.answer(prompts, batch_tokens=1) == wanted
    assert card.answer(prompts, batch_tokens=100_000) == wanted
