"""Quantizing: codes that learn, at the bits that were asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.zoo import make_model as make_specimen

from shortstack.checkpoint import Checkpoint
from shortstack.errors import SettingError, ShortstackError
from shortstack.pretrained import load
from shortstack.prune.heal.sample import sampled_windows
from shortstack.prune.quantize import LearningText, QuantizeSettings, learn, quantize
from shortstack.prune.quantize.latent import grouped_counts, latent_gradients, latent_start
from shortstack.prune.quantize.latent_model import LatentModel
from shortstack.prune.quantize.matrices import matrix_names
from shortstack.prune.quantize.rate import GROUPS, bits_of_counts, coded_bits, other_bits
from shortstack.row_codes import RowCodesReader

SETTINGS = QuantizeSettings(
    bits=4.0,
    method="compensated",
    tune_steps=0,
    learning_rate=0.003,
    batch_tokens=512,
    device="cpu",
)


def written_by(checkpoint: Checkpoint, count: int, length: int = 64) -> list[list[int]]:
    """Text that the model writes itself: as much of it as one wants, and of its own kind."""
    starts = [[7 * at % 250] for at in range(count)]
    return sampled_windows(checkpoint, starts, length, count, batch=count, device="cpu")


def kl(first: Path, second: Path, windows: list[list[int]]) -> float:
    """Nats a token of KL(first || second), float32."""
    with torch.no_grad():
        one, two = (
            load(path, torch.float32)(torch.tensor(windows)).logits[:, :-1].log_softmax(-1)
            for path in (first, second)
        )
    return float((one.exp() * (one - two)).sum(-1).mean())


def made(
    folder: Path, out: Path, text: LearningText, **settings: Any
) -> tuple[Checkpoint, dict[str, Any]]:
    out.mkdir()
    changed = dataclasses.replace(SETTINGS, **settings)
    few = text.windows[:16]
    return quantize(Checkpoint.open(folder), out, changed, calibration=few, learning=text)


def test_learning_nears_the_original_on_other_text_at_the_same_bits(
    tiny: Path, tmp_path: Path
) -> None:
    windows = written_by(Checkpoint.open(tiny), 400)
    text = LearningText(windows[:320], windows[320:340])
    facts = {}
    for tokens in (0, 20_480):
        _, facts[tokens] = made(
            tiny, tmp_path / f"{tokens}", text, learn_tokens=tokens, learning_rate=0.006
        )
    before, after = (kl(tiny, tmp_path / f"{tokens}", windows[340:]) for tokens in (0, 20_480))
    assert after < 0.95 * before
    assert facts[20_480]["bits_per_weight"] == pytest.approx(4.0, abs=0.01)
    told = facts[20_480]["learning"]
    assert told["kl_held_out_after"] < 0.95 * told["kl_held_out_before"]
    assert told["tokens_seen"] == 20_480
    first, second = (RowCodesReader(tmp_path / f"{tokens}") for tokens in (0, 20_480))
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.mean(first.read(name).codes != second.read(name).codes) > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3-multimodal"])
def test_what_is_written_is_what_was_learnt(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "choose_dtype", lambda name: torch.float32)
    folder = make_specimen(name, tmp_path / "model")
    windows = torch.randint(512, (13, 48), generator=torch.Generator().manual_seed(0)).tolist()
    text = LearningText(windows[1:], windows[:1])
    out = tmp_path / "out"
    _, facts = made(folder, out, text, bits=7.0, learn_tokens=3 * 192, batch_tokens=192)
    sidecar, tensors = RowCodesReader(out), load_file(out / "model.safetensors")
    for one in sidecar.names:
        assert np.array_equal(tensors[one].numpy(), sidecar.read(one).weights())
    told = facts["learning"]["kl_held_out_after"]
    assert kl(folder, out, windows[:1]) == pytest.approx(told, rel=0.02, abs=1e-6)


class Killed(Exception):
    """What ends a run in the middle."""


def test_a_killed_run_goes_on_and_bits_are_set_right(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs start from plain rounding at 4 bits and want 3.9."""
    monkeypatch.setattr(learn, "SAVE_EVERY_S", 0.0)
    original = Checkpoint.open(tiny)
    windows = written_by(original, 60)
    text = LearningText(windows[8:], windows[:8])
    start = tmp_path / "start"
    made(tiny, start, text, method="plain")
    wanted = 3.9 * original.n_params - other_bits(original, matrix_names(original))
    settings = dataclasses.replace(SETTINGS, learn_tokens=10 * 512)

    def learner() -> learn.Learner:
        model = LatentModel(original, start, torch.device("cpu"))
        return learn.Learner(original, model, text, wanted, settings)

    def kill(done: int, total: int) -> None:
        if done == 6:
            raise Killed

    whole = learner().run(lambda done, total: None)
    with pytest.raises(Killed):
        learner().run(kill, tmp_path / "state", "key")
    second = learner().run(lambda done, total: None, tmp_path / "state", "key")
    assert second.facts["history"] == whole.facts["history"]
    for name, matrix in whole.best.matrices.items():
        assert np.array_equal(matrix.codes, second.best.matrices[name].codes)
        assert np.array_equal(matrix.steps, second.best.matrices[name].steps)
    n_codes = sum(matrix.codes.size for matrix in whole.best.matrices.values())
    bits = [one["bits"] for one in whole.facts["history"]]
    assert bits[0] > wanted / n_codes + 0.08
    assert bits[-1] == pytest.approx(wanted / n_codes, abs=0.01)
    assert whole.facts["best_step"] > 0, "the start takes more bits than are wanted"


def test_what_takes_less_than_was_asked_for_is_left_as_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch that moves no code moves all weights: with nothing learnt the state stays."""
    monkeypatch.setattr(learn, "SCALE_RATE", 0.0)
    original = Checkpoint.open(tiny)
    windows = written_by(original, 20)
    made(tiny, tmp_path / "start", LearningText(windows[4:], windows[:4]), method="plain")
    wanted = 4.05 * original.n_params - other_bits(original, matrix_names(original))
    settings = dataclasses.replace(SETTINGS, learn_tokens=10 * 512, learning_rate=1e-9)
    model = LatentModel(original, tmp_path / "start", torch.device("cpu"))
    text = LearningText(windows[4:], windows[:4])
    found = learn.Learner(original, model, text, wanted, settings).run(lambda done, total: None)
    assert len({one["kl"] for one in found.facts["history"]}) == 1
    assert found.facts["history"][0]["bits"] < wanted / model.n_codes - 0.03


def judged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl: list[float], bits: float
) -> tuple[learn.Learned, list[str]]:
    """A run of eight checks that see the distances `kl`, at `bits` a weight wanted."""
    original = Checkpoint.open(tiny)
    windows = written_by(original, 24)
    notes: list[str] = []
    text = LearningText(windows[8:], windows[:8], note=notes.append)
    made(tiny, tmp_path / "start", text, method="plain")
    wanted = bits * original.n_params - other_bits(original, matrix_names(original))
    settings = dataclasses.replace(SETTINGS, learn_tokens=8 * 512)
    model = LatentModel(original, tmp_path / "start", torch.device("cpu"))
    learner = learn.Learner(original, model, text, wanted, settings)
    seen = iter(kl)
    monkeypatch.setattr(learner, "_divergence", lambda: next(seen))
    return learner.run(lambda done, total: None), notes


NAN = float("nan")


def test_a_distance_that_is_no_number_is_never_the_best(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl = [NAN, 0.5, NAN, 0.4, 0.6, NAN, 0.7, 0.8, NAN]
    facts = judged(tiny, tmp_path, monkeypatch, kl, 4.0)[0].facts
    assert (facts["best_step"], facts["kl_held_out_after"]) == (3, 0.4)
    assert facts["kl_held_out_before"] is None
    json.dumps(facts, allow_nan=False)


def test_the_start_is_kept_where_no_state_fits(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wanted are fewer bits than any stretch gives within the run."""
    monkeypatch.setattr(learn, "LAST_STRETCH", 0.0)
    found, notes = judged(tiny, tmp_path, monkeypatch, [0.5, *[0.1] * 8], 3.0)
    assert (found.facts["best_step"], found.facts["kl_held_out_after"]) == (0, 0.5)
    assert "the start is kept" in notes[-1]
    start = RowCodesReader(tmp_path / "start")
    for name, matrix in found.best.matrices.items():
        assert np.array_equal(matrix.codes, start.read(name).codes)


def test_counts_by_groups_are_the_coders_own() -> None:
    codes = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    codes = (codes * torch.linspace(1, 30, 50)[:, None]).round().clamp(-127, 127).to(torch.int8)
    counts = list(grouped_counts(codes, GROUPS))
    assert bits_of_counts(counts, 50) == pytest.approx(coded_bits(codes.numpy()))
    assert len(grouped_counts(codes[:3], GROUPS)) == 3


def test_latent_codes_start_within_their_codes() -> None:
    codes = torch.tensor([[3, -2, 0]], dtype=torch.int8)
    weights = torch.tensor([[0.31, -0.25, 0.02]])
    start = latent_start(weights, codes, torch.tensor([0.1]))
    assert start.tolist()[0] == pytest.approx([3.1, -2.45, 0.2])
    assert torch.equal(start.round(), codes.float())


def test_gradients_pass_rounding_as_if_it_were_not_there() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = (5 * torch.randn(4, 6, generator=generator)).requires_grad_()
    factors, base = torch.rand(4, generator=generator) + 0.5, torch.rand(4, generator=generator)
    factors.requires_grad_()
    wanted = torch.randn(4, 6, generator=generator)
    through = latent + (latent.round() - latent).detach()
    weights = through * (base * factors)[:, None]
    weights.retain_grad()
    (weights * wanted).square().sum().backward()
    assert weights.grad is not None
    found = latent_gradients(
        weights.grad.clone(), weights.detach(), (base * factors).detach(), factors.detach()
    )
    for one, parameter in zip(found, (latent, factors), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, rtol=1e-4)


def test_settings_of_learning_are_checked(tiny: Path, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"learn_tokens": -1, "learning_rate": 0.0, "batch_tokens": 0}
    for name, value in wrong.items():
        with pytest.raises(SettingError, match=name):
            dataclasses.replace(SETTINGS, **{name: value})
    with pytest.raises(ShortstackError, match="learning codes needs text"):
        made(tiny, tmp_path / "one", LearningText([[1, 2, 3]], []), learn_tokens=3)
    text = LearningText([[1, 2, 3]], [[4, 5, 6]])
    with pytest.raises(ShortstackError, match="device 'cuda:77' cannot be used"):
        made(tiny, tmp_path / "two", text, learn_tokens=3, device="cuda:77")
