"""What is tuned: the right continuation alone, or the choice between all of them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from tests.trimming import QUICK, WORDS, log_likelihood, longer, made_up, parts, run

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.trim.model import TrimModel
from shortstack.prune.trim.rows import Parts, encode, example
from shortstack.prune.trim.scan import Exam, evaluate
from shortstack.prune.trim.settings import Settings
from shortstack.prune.trim.tune import Tuner, choices_loss
from shortstack.questions import Question
from shortstack.tokens import Encoder

CHOICES = dataclasses.replace(QUICK, objective="choices")


@pytest.fixture
def opened(tiny: Path) -> tuple[TrimModel, Encoder]:
    return TrimModel(load(tiny, torch.float32), "sub-block"), Encoder(Checkpoint.open(tiny))


def mixed() -> list[Question]:
    """Two and three choices a question, of one id and of several."""
    return [*longer(5), *made_up(4)]


def test_the_loss_over_choices_is_the_scans(opened: tuple[TrimModel, Encoder]) -> None:
    model, encoder = opened
    batch = [example(encoder, question, 64, "choices") for question in mixed()]
    expected = []
    for one, question in zip(batch, mixed(), strict=True):
        assert one.rows == encode(encoder, question, 64)
        logs = torch.tensor([log_likelihood(model.hf, row) for row in one.rows])
        expected.append(-logs.log_softmax(0)[question.answer])
    loss = choices_loss(model, batch)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    exam = Exam(encoder, mixed(), 64, torch.device("cpu"))
    assert evaluate(model, exam).nats == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    grads = [p.grad for p in model.hf.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


def test_a_batch_in_pieces_has_the_gradients_of_the_whole(
    opened: tuple[TrimModel, Encoder],
) -> None:
    model, encoder = opened
    batch = [example(encoder, question, 64, "choices") for question in mixed()]
    tuner = Tuner(model, CHOICES, model.all_units)
    losses, gradients = [], []
    for pieces in (1, 2):
        tuner.pieces = pieces
        losses.append(tuner._gradients(batch).item())
        gradients.append({n: p.grad.clone() for n, p in tuner.parameters.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_choices_of_one_id_run_once(opened: tuple[TrimModel, Encoder]) -> None:
    """As many ids are read as for the right choice alone."""
    model, encoder = opened
    read = {}
    questions = [dataclasses.replace(q, choices=("the", "of")) for q in made_up(16)]
    for objective in ("answer", "choices"):
        batch = [example(encoder, question, 48, objective) for question in questions]
        settings = dataclasses.replace(QUICK, objective=objective)
        sizes: list[int] = []
        hook = model.hf.model.embed_tokens.register_forward_pre_hook(
            lambda _, args, sizes=sizes: sizes.append(args[0].numel())
        )
        took = Tuner(model, settings, model.all_units).round(batch, 0, lambda: None)
        hook.remove()
        read[objective] = (took.n_tokens, sizes)
    assert read["choices"] == read["answer"]


def test_the_loss_falls_and_the_rule_is_learnt_as_well(tiny: Path, tmp_path: Path) -> None:
    """Half of the sub-blocks are left; choices tell the rule apart at least as well."""
    scores = {}
    for objective in ("answer", "choices"):
        settings = dataclasses.replace(QUICK, objective=objective, drop_per_step=2, batch_rows=4)
        result = run(tiny, tmp_path / objective, settings, parts=parts(96, 16, 64))
        losses = [row["loss"] for row in result.curve]
        assert losses[-1] < 0.5 * losses[0]
        scores[objective] = result.tests[6]["test"].accuracy
    assert scores["choices"] >= scores["answer"]
    assert scores["choices"] >= 0.95


def wordy(count: int) -> list[Question]:
    """The same rule, but each choice has words of its own, which nothing foretells."""
    draw = random.Random(0)
    return [
        dataclasses.replace(
            question,
            choices=tuple(
                " ".join([*draw.choices(WORDS, k=2), choice]) for choice in question.choices
            ),
        )
        for question in made_up(count)
    ]


def test_choices_are_not_taught_what_nothing_foretells(tiny: Path, tmp_path: Path) -> None:
    """Of long answers the right one's likelihood is mostly its words', not the rule's."""
    rows = tuple(wordy(176))
    split = Parts(rows[:96], rows[96:112], rows[112:])
    scores = {}
    for objective in ("answer", "choices"):
        settings = dataclasses.replace(
            QUICK, objective=objective, drop_per_step=2, ratio=1.0, mode="full"
        )
        result = run(tiny, tmp_path / objective, settings, parts=split)
        scores[objective] = result.tests[12]["test"]
    assert scores["choices"].accuracy >= max(0.95, scores["answer"].accuracy)
    assert scores["choices"].nats < scores["answer"].nats / 5


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ShortstackError, match="unknown objective 'choice'"):
        Settings(objective="choice")
