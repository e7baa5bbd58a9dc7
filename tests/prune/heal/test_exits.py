"""Exits in training: the loss against its definition, what learns, what goes on after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.healing import Windows, read, settings
from torch.nn import functional

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.exits.model import exit_modules
from shortstack.pretrained import load
from shortstack.prune.exits import train as training
from shortstack.prune.exits.divergence import joint_divergence
from shortstack.prune.exits.start import starting_tensors
from shortstack.prune.exits.student import ExitStudent
from shortstack.prune.exits.train import ExitChoice, train_exits
from shortstack.prune.heal.distill import Head

CHOICE = ExitChoice((2, 4))


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 5.0)])
def test_the_joint_loss_and_its_gradient_are_those_of_autograd(
    scale: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortstack.prune.exits.divergence.chunk_rows", lambda head: 3)
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 6), torch.randn(40)
    head = Head(weight, bias, scale, cap)
    teacher = torch.randn(7, 6)
    hidden = [torch.randn(7, 6, requires_grad=True) for _ in range(2)]
    own = [states.detach().clone().requires_grad_(True) for states in hidden]
    sums = joint_divergence(hidden, teacher, head)
    (sums * torch.tensor([1.0, 3.0])).sum().backward()

    def log_q(states: torch.Tensor) -> torch.Tensor:
        logits = scale * (states @ weight.T + bias)
        return (cap * (logits / cap).tanh() if cap else logits).log_softmax(-1)

    wanted = [
        functional.kl_div(log_q(states), log_q(teacher), reduction="sum", log_target=True)
        for states in own
    ]
    (wanted[0] + 3.0 * wanted[1]).backward()
    torch.testing.assert_close(sums, torch.stack(wanted).detach())
    for mine, theirs in zip(hidden, own, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_one_pass_gives_what_each_exit_gives_by_itself(original: Checkpoint) -> None:
    frozen = load(original.path, torch.float32)
    start = starting_tensors(frozen, original, (2, 4), "random", 0)
    student = ExitStudent(frozen, *exit_modules(frozen, start, torch.float32))
    tokens = torch.arange(1, 65).reshape(2, 32)
    from shortstack.exits.model import with_tensors

    opened = with_tensors(frozen, start)
    with torch.no_grad():
        kl, nats, same = student.figures(tokens)[:2].T
        truth = opened.model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        for at, exit in enumerate((2, 4)):
            said = opened.at(exit)(input_ids=tokens).logits[:, :-1].log_softmax(-1)
            assert float(kl[at]) == pytest.approx(float((truth.exp() * (truth - said)).sum()), 1e-4)
            picked = said.gather(-1, tokens[:, 1:, None])
            assert float(nats[at]) == pytest.approx(-float(picked.sum()), 1e-4)
            assert int(same[at]) == int((said.argmax(-1) == truth.argmax(-1)).sum())


@pytest.mark.parametrize("init", ["last", "random", "norm-only"])
def test_training_lowers_every_exits_loss_and_leaves_the_model_alone(
    original: Checkpoint, windows: Windows, tmp_path: Path, init: str
) -> None:
    before = read(original)
    (tmp_path / "exits").mkdir()
    made = train_exits(original, ExitChoice((2, 4), init), *windows, tmp_path / "exits", settings())
    for row in made.facts["losses"].values():
        assert row["after"]["kl"] < row["before"]["kl"]
    assert made.facts["best_step"] == made.facts["steps"] == 10
    assert read(original) == before
    assert made.open_base().sha256 == original.sha256
    assert made.dtype == "BF16"  # the type of the model's own layers


def test_in_bfloat16_the_frozen_model_rotates_as_it_did(
    original: Checkpoint, windows: Windows
) -> None:
    lens = ExitChoice((2,), "none")
    told: list[torch.Tensor] = []
    for dtype in ("float32", "bfloat16"):
        run = training.ExitLoop(
            *(original, lens, windows[1][:1], windows[1], settings(tokens=0, dtype=dtype)), print
        )
        frozen = run.module._frozen[0]
        told.append(frozen.get_decoder().rotary_emb.inv_freq)
        assert next(frozen.parameters()).dtype == getattr(torch, dtype)
    assert torch.equal(*told)


def test_the_lens_is_the_models_own_norm(
    original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    lens = ExitChoice((2, 4), "none")
    made = train_exits(original, lens, *windows, tmp_path, settings(tokens=0))
    own = load(original.path, torch.bfloat16).get_decoder().norm.weight
    assert torch.equal(made.load(4)["norm.weight"], own)
    with pytest.raises(ShortstackError, match="Leave them out, or choose another init"):
        train_exits(original, lens, *windows, tmp_path, settings())


def test_a_killed_run_ends_as_one_that_was_not(
    original: Checkpoint, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(save_steps=4, eval_steps=5)
    for name in ("whole", "killed", "again"):
        (tmp_path / name).mkdir()
    whole = train_exits(original, CHOICE, *windows, tmp_path / "whole", asked)

    class Killed(Exception):
        pass

    def dies(done: int, total: int) -> None:
        if done == 6:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        train_exits(
            *(original, CHOICE, *windows, tmp_path / "killed", asked), progress=dies, state=state
        )
    notes: list[str] = []
    again = train_exits(
        *(original, CHOICE, *windows, tmp_path / "again", asked), note=notes.append, state=state
    )
    assert "going on from step 4" in notes
    assert not state.exists()
    assert again.sha256 == whole.sha256


def test_where_training_harms_the_start_is_kept(
    original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    notes: list[str] = []
    made = train_exits(
        *(original, CHOICE, *windows, tmp_path, settings(learning_rate=100.0)), note=notes.append
    )
    assert any("the start is kept" in text for text in notes)
    losses = made.facts["losses"]["4"]
    assert losses["after"]["kl"] == pytest.approx(losses["before"]["kl"], rel=1e-2)


def test_what_cannot_be_trained_is_refused_before_a_model_is_loaded(
    original: Checkpoint, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "ExitLoop", None)
    with pytest.raises(ShortstackError, match="no exit behind 6 layers: the model has 6"):
        train_exits(original, ExitChoice((6,)), *windows, tmp_path, settings())
    with pytest.raises(ShortstackError, match="Did you mean 'random'"):
        ExitChoice((2,), "randm")
