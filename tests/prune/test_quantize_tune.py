"""Quantizing: what is learned after rounding, and what rounding makes up for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.zoo import NAMES
from tests.zoo import make_model as make_specimen

from shortstack.checkpoint import Checkpoint
from shortstack.errors import SettingError, ShortstackError
from shortstack.pretrained import load
from shortstack.prune.quantize import QuantizeSettings, compensate, quantize, tune
from shortstack.row_codes import RowCodes, RowCodesReader, RowCodesWriter, replace_steps
from shortstack.tokens import Encoder


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_tuned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "choose_dtype", lambda name: torch.float32)
    original = Checkpoint.open(make_specimen(name, tmp_path / "model"))
    windows = torch.randint(512, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
    out = tmp_path / "out"
    out.mkdir()
    settings = QuantizeSettings(bits=7.0, method="compensated", tune_steps=4)
    written, facts = quantize(original, out, settings, calibration=windows)
    assert facts["bits_per_weight"] < 8.0
    assert list(facts["kl_held_out"]) == ["0", "1", "2", "3", "4"]
    models = [load(checkpoint.path, torch.float32) for checkpoint in (original, written)]
    with torch.no_grad():
        one, two = (model(torch.tensor(windows[7:])).logits for model in models)
    assert 0 < (one - two).square().mean() / one.square().mean() < 0.02
    one, two = one[:, :-1].log_softmax(-1), two[:, :-1].log_softmax(-1)
    kl = float((one.exp() * (one - two)).sum(-1).mean())
    assert kl == pytest.approx(min(facts["kl_held_out"].values()), rel=0.05, abs=1e-6)


def test_tuning_nears_the_original_and_costs_no_bit(tiny: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny)
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    windows = Encoder(original).windows([text], 64, 40)
    facts, tensors, sidecars = {}, {}, {}
    for steps in (0, 60):
        out = tmp_path / f"{steps}"
        out.mkdir()
        settings = QuantizeSettings(bits=4.0, method="compensated", tune_steps=steps)
        _, facts[steps] = quantize(original, out, settings, calibration=windows)
        tensors[steps] = load_file(out / "model.safetensors")
        sidecars[steps] = RowCodesReader(out)
    kl = facts[60]["kl_held_out"]
    assert min(kl.values()) < 0.98 * kl["0"]
    assert facts[60]["bits_per_weight"] == facts[0]["bits_per_weight"]
    for name, tensor in tensors[60].items():
        if name not in sidecars[0].names:
            assert not torch.equal(tensor, tensors[0][name]), "norms learn"
            continue
        before, after = (sidecars[steps].read(name) for steps in (0, 60))
        assert np.array_equal(before.codes, after.codes)
        assert np.all(after.steps > 0)
        assert not np.array_equal(before.steps, after.steps)
        assert np.array_equal(tensor.numpy(), after.weights())


def test_settings_of_tuning_are_checked(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="tune_steps"):
        QuantizeSettings(tune_steps=-1)
    settings = QuantizeSettings(bits=5.0, method="compensated", tune_steps=1)
    with pytest.raises(ShortstackError, match="tuning needs two windows"):
        quantize(Checkpoint.open(tiny), tmp_path, settings, calibration=[[1, 2, 3]])


def test_steps_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"b": (3, 5), "a": (4, 2)}
    made = {
        name: RowCodes(random.integers(-127, 128, shape, np.int8), np.ones(shape[0], np.float16))
        for name, shape in shapes.items()
    }
    with RowCodesWriter(tmp_path, shapes) as writer:
        for name in ("a", "b"):
            writer.write(name, made[name])
    fresh = np.array([0.5, 0.25, 2.0, 4.0], np.float16)
    replace_steps(tmp_path, shapes, {"a": fresh})
    sidecar = RowCodesReader(tmp_path)
    assert np.array_equal(sidecar.read("a").steps, fresh)
    assert np.array_equal(sidecar.read("b").steps, made["b"].steps)
    assert all(np.array_equal(sidecar.read(n).codes, made[n].codes) for n in shapes)
    with pytest.raises(ValueError, match="expected 3 steps"):
        replace_steps(tmp_path, shapes, {"b": fresh})


def test_restored_weights_are_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(400, 24, generator=generator)
    after = before + 0.1 * torch.randn(400, 24, generator=generator) @ torch.randn(
        24, 24, generator=generator
    )
    weights = torch.randn(5, 24, generator=generator)
    gram, drift = after.T @ after / 400, (before - after).T @ after / 400
    best = torch.linalg.lstsq(after, before @ weights.T).solution.T
    monkeypatch.setattr(compensate, "DAMPING", 0.0)
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(compensate, "RESTORED_SHARE", share)
        made = compensate.restored(weights, gram, drift)
        assert torch.allclose(made, weights + share * (best - weights), atol=1e-4)
