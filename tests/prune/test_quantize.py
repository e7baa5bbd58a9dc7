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
from shortstack.entropy import entropy_bits
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.quantize import QuantizeSettings, quantize
from shortstack.prune.quantize.compensate import (
    compensated_codes,
    factor_of,
    remaining_power,
    unclipped_codes,
)
from shortstack.prune.quantize.compensate import fitted_steps as fitted_by_inputs
from shortstack.prune.quantize.uniform import (
    code_counts,
    fitted_steps,
    nearest_codes,
    stored_steps,
)
from shortstack.row_codes import RowCodesReader
from shortstack.tokens import Encoder


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


def test_inputs_that_are_all_zero_are_rounded_too(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Behind an up projection of zeros the down projection sees no power at all."""
    folder = make_model("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    windows = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    settings = QuantizeSettings(bits=5.0, method="compensated", tune_steps=0)
    quantize(Checkpoint.open(folder), tmp_path, settings, calibration=windows)
    made = weights_of(tmp_path)
    assert all(torch.isfinite(weight).all() for weight in made.values())
    assert not made["model.layers.1.mlp.up_proj.weight"].any()


def test_bits_that_no_step_gives_are_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    original = Checkpoint.open(make_model("llama-tied"))
    with pytest.raises(ShortstackError, match="Choose other --bits"):
        quantize(original, tmp_path, QuantizeSettings(bits=0.3))
    assert json.loads((original.path / "config.json").read_text())["model_type"] == "llama"


def test_compensated_rounding_is_the_recursion_of_gptq() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 150, generator=generator) @ torch.randn(150, 150, generator=generator)
    weights, gram = torch.randn(9, 150, generator=generator), inputs.T @ inputs / 500
    steps = torch.full((9,), 0.3)
    order, upper = factor_of(gram)
    codes = compensated_codes(weights, steps, order, upper, 127)
    left, wanted = weights[:, order].double(), torch.empty(9, 150, dtype=torch.int8)
    for column in range(150):  # as the paper has it: the inverse of what is left, anew each time
        rest = gram[order][:, order].double()
        rest.diagonal().add_(0.01 * gram.diagonal().mean())
        inverse = torch.linalg.inv(rest[column:, column:])
        wanted[:, order[column]] = (left[:, column] / 0.3).round()
        error = (left[:, column] - wanted[:, order[column]] * 0.3) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    assert (codes != wanted).double().mean() < 0.01  # ties, by the order of sums
    plain = (weights / 0.3).round()
    costs = [((weights - q * 0.3) @ inputs.T).square().mean() for q in (codes, plain)]
    assert costs[0] < 0.6 * costs[1]
    assert costs[0] == pytest.approx(150 * remaining_power(upper) * 0.09 / 12, rel=0.2)


def test_a_rate_weight_saves_bits_and_fitted_steps_save_error() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 64, generator=generator)
    weights, gram = torch.randn(200, 64, generator=generator), inputs.T @ inputs / 400
    steps, factor = torch.full((200,), 0.9), factor_of(gram)
    entropies, costs = [], []
    for rate_weight in (0.0, 1.0, 3.0):
        codes = compensated_codes(weights, steps, *factor, 127, rate_weight)
        entropies.append(entropy_bits(code_counts(codes.numpy())))
        for chosen in (steps, fitted_by_inputs(weights, codes, steps, gram)):
            error = weights - codes * chosen[:, None]
            costs.append(float((error @ gram * error).sum()))
    assert entropies == sorted(entropies, reverse=True)
    assert all(after < before for before, after in zip(costs[::2], costs[1::2], strict=True))


def test_compensated_beats_plain_at_equal_bits(tiny: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny)
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    windows = Encoder(original).windows([text], 64, 40)
    facts, costs = {}, {}
    tokens = torch.tensor(windows[32:])
    whole = load(tiny, torch.float32)(tokens).logits.log_softmax(-1)
    for method in ("plain", "compensated"):
        out = tmp_path / method
        out.mkdir()
        settings = QuantizeSettings(bits=4.5, method=method)
        _, facts[method] = quantize(original, out, settings, calibration=windows[:32])
        logits = load(out, torch.float32)(tokens).logits.log_softmax(-1)
        costs[method] = (whole.exp() * (whole - logits)).sum(-1).mean().item()
        assert facts[method]["bits_per_weight"] == pytest.approx(4.5, abs=0.06)
        sidecar = RowCodesReader(out)
        for name, tensor in weights_of(out).items():
            if name in sidecar.names:
                assert np.array_equal(tensor.numpy(), sidecar.read(name).weights())
    assert costs["compensated"] < 0.7 * costs["plain"]


def test_every_variant_can_be_compensated(any_model: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(any_model)
    windows = torch.randint(96, (12, 32), generator=torch.Generator().manual_seed(0)).tolist()
    out = tmp_path / "out"
    out.mkdir()
    settings = QuantizeSettings(bits=6.0, method="compensated")
    with pytest.raises(ShortstackError, match="needs calibration text"):
        quantize(original, out, settings)
    _, facts = quantize(original, out, settings, calibration=windows)
    names = {m["name"] for m in facts["matrices"]}
    assert names == {name for name, t in weights_of(any_model).items() if t.ndim == 2}
    tokens = torch.tensor(windows[:2])
    one, two = (load(path, torch.float32)(tokens).logits for path in (any_model, out))
    assert 0 < (one - two).square().mean() < 0.05 * one.square().mean()


def test_compensated_codes_are_never_clipped() -> None:
    """Peaks within 127 steps, but inputs so alike that later columns make up for many before."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(400, 1, generator=generator)
    inputs = shared + 0.03 * torch.randn(400, 96, generator=generator)
    weights = torch.randn(40, 96, generator=generator).sign() * 0.1 * 126.9
    weights[20:] *= 0.01
    steps = torch.full((40,), 0.1)
    order, upper = factor_of(inputs.T @ inputs / 400)
    clipped = compensated_codes(weights, steps, order, upper, 127)
    codes, larger = unclipped_codes(weights, steps, order, upper, 127)
    beyond = larger > steps
    assert 0 < beyond.sum() <= 20, "small rows keep their steps"
    assert torch.equal(larger, larger.half().float().where(beyond, steps))
    assert torch.equal(codes[~beyond], clipped[~beyond])
    again = compensated_codes(weights, larger, order, upper, 10_000)  # int8 would wrap around
    assert torch.equal(codes, again)
    costs = [
        ((weights - q * s[:, None]) @ inputs.T)[beyond].square().mean()
        for q, s in ((clipped, steps), (codes, larger))
    ]
    assert costs[1] < costs[0]


@pytest.mark.parametrize("place", ["model.layers.1.input_layernorm", "model.norm"])
def test_a_norm_beyond_all_others_is_one_line(
    place: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{place}.weight"][0] = 1e30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    windows = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    settings = QuantizeSettings(bits=5.0, method="compensated", tune_steps=0)
    with pytest.raises(ShortstackError, match="cannot be reckoned with on the calibration text"):
        quantize(Checkpoint.open(folder), tmp_path, settings, calibration=windows)
    out = tmp_path / "plain"
    out.mkdir()
    quantize(Checkpoint.open(folder), out, QuantizeSettings(bits=5.0))
