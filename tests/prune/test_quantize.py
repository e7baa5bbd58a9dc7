"""Quantizing: the arithmetic, and folders whose weights are codes times steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.quantize import QuantizeSettings, quantize
from shortstack.prune.quantize.uniform import (
    code_counts,
    entropy_bits,
    fitted_steps,
    nearest_codes,
    stored_steps,
)
from shortstack.row_codes import RowCodesReader


def test_the_entropy_of_codes_is_shannons() -> None:
    codes = np.array([[-1, 0, 0, 1], [0, 0, 1, -1]], np.int8)
    assert code_counts(codes)[127:130].tolist() == [2, 4, 2]
    assert entropy_bits(code_counts(codes)) == pytest.approx(8 * 1.5)
    assert entropy_bits(code_counts(np.zeros((3, 3), np.int8))) == 0.0


def test_no_weight_is_clipped_however_small_the_step() -> None:
    weights = np.random.default_rng(0).standard_t(2, (200, 64)).astype(np.float32)
    peaks = np.abs(weights).max(axis=1)
    steps = stored_steps(np.full(200, 1e-4), peaks, 127)
    assert np.array_equal(steps, steps.astype(np.float16))
    unclipped = np.rint(weights / steps[:, None])
    assert np.abs(unclipped).max() == 127
    assert np.array_equal(nearest_codes(weights, steps, 127), unclipped)
    assert np.all(np.abs(peaks / 127.49 / steps - 1) < 2e-3), "and no larger than needed"


def test_fitted_steps_are_least_squares() -> None:
    weights = np.random.default_rng(1).normal(size=(8, 100)).astype(np.float32)
    steps = np.full(8, 0.9, np.float32)
    codes = nearest_codes(weights, steps, 127)
    codes[3] = 0
    fitted = fitted_steps(weights, codes, steps)
    assert fitted[3] == steps[3]
    for row in (0, 1, 2, 4):
        best = np.linalg.lstsq(codes[row, :, None].astype(float), weights[row], rcond=None)[0]
        assert fitted[row] == pytest.approx(best[0], rel=1e-5)


def test_the_folder_is_codes_times_steps_and_loads_anywhere(
    any_model: Path, tmp_path: Path
) -> None:
    original = Checkpoint.open(any_model)
    out = tmp_path / "out"
    out.mkdir()
    written, facts = quantize(original, out, QuantizeSettings(bits=7.0))
    assert facts["bits_per_weight"] == pytest.approx(7.0, abs=0.05)
    sidecar, before, after = RowCodesReader(out), weights_of(any_model), weights_of(out)
    assert set(sidecar.names) == {n for n, t in before.items() if t.ndim == 2}
    for name, tensor in after.items():
        if name in sidecar.names:
            assert np.array_equal(tensor.numpy(), sidecar.read(name).weights())
        else:
            assert torch.equal(tensor, before[name])
    tokens = torch.arange(20)[None]
    one, two = (load(path, torch.float32)(tokens).logits for path in (any_model, out))
    assert 0 < (one - two).square().mean() < 0.01 * one.square().mean()
    assert written.config["dtype"] == "float32"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_fewer_bits_are_fewer_bytes(make_model: Callable[..., Path], tmp_path: Path) -> None:
    original = Checkpoint.open(make_model("llama-tied", dtype=torch.bfloat16))
    for bits in (5.0, 6.0):
        out = tmp_path / f"{bits}"
        out.mkdir()
        _, facts = quantize(original, out, QuantizeSettings(bits=bits))
        assert facts["bits_per_weight"] == pytest.approx(bits, abs=0.05)
        assert facts["coded_bytes"] == round(facts["bits_per_weight"] * original.n_params / 8)


def test_a_model_of_zeros_and_one_with_a_hole(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][2] = 0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    quantize(Checkpoint.open(folder), out, QuantizeSettings(bits=5.0))
    assert not weights_of(out)[name][2].any()
    tensors[name][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortstackError, match=r"up_proj\.weight holds numbers that are not finite"):
        quantize(Checkpoint.open(folder), tmp_path, QuantizeSettings(bits=5.0))


def test_bits_that_no_step_gives_are_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    original = Checkpoint.open(make_model("llama-tied"))
    with pytest.raises(ShortstackError, match="Choose other --bits"):
        quantize(original, tmp_path, QuantizeSettings(bits=0.3))
    assert json.loads((original.path / "config.json").read_text())["model_type"] == "llama"
