"""A quantized folder carried as what the original does not tell."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks.code_deltas import restore, save
from safetensors.torch import load_file

from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.prune.quantize import QuantizeSettings, quantize


def test_a_restored_folder_has_the_very_weights(tiny: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny)
    first, file, second = (tmp_path / name for name in ("first", "codes", "second"))
    first.mkdir()
    windows = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    settings = QuantizeSettings(bits=4.0, method="compensated", tune_steps=1, device="cpu")
    quantize(original, first, settings, calibration=windows)
    save(original, first, file)
    restore(original, file, second)
    assert file.stat().st_size < 0.5 * (first / SIDECAR).stat().st_size
    assert (first / SIDECAR).read_bytes() == (second / SIDECAR).read_bytes()
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
