"""Integers in ONNX graphs: what is stored, and that onnxruntime reads it as we wrote it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.agreement import TOKENS, distance, run
from tests.columns import mismatches
from tests.zoo import NAMES, make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import to_onnx
from shortstack.export.importance import HEAD, observe
from shortstack.export.importance_file import read_channels
from shortstack.export.onnx_builders import choose
from shortstack.export.onnx_rounding import quantize_rows

Floats = NDArray[np.float32]
GENAI = ("llama", "phi4-mini", "qwen3", "gemma2")
"""Models of the zoo that genai's builder makes, and spells in its ways."""


def restored(
    table: Floats, block: int, bits: int, importance: Floats | None = None
) -> NDArray[np.float32]:
    """What codes and scales stand for."""
    codes, scales = quantize_rows(table, block, bits, importance)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], block)
    whole = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    return (whole * scales[..., None]).reshape(table.shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_to_half_a_step(bits: int) -> None:
    table = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    table[3, :32] = 0
    _, scales = quantize_rows(table, 32, bits)
    steps = np.abs(scales)[..., None]
    off = np.abs(restored(table, 32, bits) - table).reshape(7, 2, 32)
    # the block's largest weight is exact; one as large of the other sign is a step too far
    assert (off <= 1.001 * steps).all()
    assert (off <= 0.501 * steps).mean() > 0.97
    assert off[3, 0].max() == 0


def errors(table: Floats, found: Floats, importance: Floats, block: int) -> NDArray[np.float64]:
    """Σ importance · error² of each block."""
    wide = importance.astype(np.float64) * np.square(found.astype(np.float64) - table)
    sums: NDArray[np.float64] = wide.reshape(len(table), -1, block).sum(-1)
    return sums


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_importance_makes_no_block_worse_for_what_it_says(block: int) -> None:
    random = np.random.default_rng(block)
    table = random.standard_t(3, size=(70, 1024)).astype(np.float32)  # more than one part
    importance = random.lognormal(sigma=3, size=1024).astype(np.float32)
    table[3, :512] = 0
    table[4] *= np.float32(1e-30)
    table[5] *= np.float32(1e30)
    table[6, ::2] = 0
    table[7] = -np.abs(table[7])
    importance[-block:] = 0
    weighed = restored(table, block, 4, importance)
    assert np.isfinite(weighed).all()
    assert not weighed[3, :512].any()
    size = np.abs(table).max(-1, keepdims=True)
    table, weighed, blind = table / size, weighed / size, restored(table, block, 4) / size
    after, before = (errors(table, found, importance, block) for found in (weighed, blind))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.7 * before.sum()
    # where nothing counts there is nothing to gain, and rounding stays what it was
    np.testing.assert_allclose(weighed[:, -block:], blind[:, -block:], rtol=1e-6)


def test_only_what_channels_are_worth_against_each_other_counts() -> None:
    random = np.random.default_rng(1)
    table = random.normal(size=(5, 64)).astype(np.float32)
    importance = random.lognormal(size=64).astype(np.float32)
    expected = restored(table, 32, 4, importance)
    for factor in (1e-30, 1e30):
        found = restored(table, 32, 4, importance * np.float32(factor))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isfinite(restored(table, 32, 4, np.zeros_like(importance))).all()


@pytest.mark.parametrize(
    ("builder", "name"),
    [*(("mobius", name) for name in NAMES), *(("genai", name) for name in GENAI)],
)
def test_every_matrix_finds_the_importance_of_what_it_reads(
    builder: str, name: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(make_model(name, tmp_path / "model"))
    _, made = choose(checkpoint, builder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the builders', who work in a child
        count, wrong = mismatches(checkpoint, made.build(checkpoint, tmp_path / "scratch"))
    assert count >= 4 * checkpoint.n_layers
    assert not wrong


def weights_by_tensor(checkpoint: Checkpoint, folder: Path) -> dict[str, Floats]:
    """Importance by the names of the checkpoint's tensors."""
    observe(checkpoint, [TOKENS], channels=folder / "channels")
    found = read_channels(folder / "channels")
    named = {
        checkpoint.family.layer_name(i, rule): found[f"layers.{i}.{rule.hf[: -len('.weight')]}"]
        for i in range(checkpoint.n_layers)
        for rule in checkpoint.family.layer
        if rule.hf.endswith("_proj.weight")
    }
    tables = checkpoint.family.outer[0].hf if checkpoint.tied else checkpoint.family.head.hf
    return {**named, tables: found[HEAD]}


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("name", ["llama", "phi4-mini", "gemma3", "llama-untied"])
@pytest.mark.parametrize(
    ("target", "options", "head", "down"),
    [
        ("onnx:int8", {}, 8, 8),
        ("onnx:int4", {}, 4, 4),
        ("onnx:int4", {"head": "int8"}, 8, 4),
        ("onnx:int4", {"imatrix": "no"}, 8, 8),
        ("onnx:int4", {"imatrix": "no", "head": "int4", "wide": "none"}, 4, 4),
    ],
    ids=["int8", "int4", "int4 but the head", "blind int4", "all blind int4"],
)
def test_the_runtime_reads_what_was_rounded(
    name: str, target: str, options: dict[str, str], head: int, down: int, tmp_path: Path
) -> None:
    """Held against PyTorch on weights rounded in Python: the rest is int8 products'."""
    folder = make_model(name, tmp_path / "model")
    spec = ExportSpec.parse(target, **options)
    body = 8 if spec.precision == "int8" else 4
    (tmp_path / "out").mkdir()
    checkpoint = Checkpoint.open(folder)
    made = to_onnx.export(checkpoint, spec, tmp_path / "out", calibration=[TOKENS])
    found = run(made.path, "onnxruntime")
    weighs = to_onnx.wants_importance(spec)
    assert any("importance from 64 tokens" in note for note in made.notes) == weighs
    assert not any("without importance" in note for note in made.notes)
    importance = weights_by_tensor(checkpoint, tmp_path) if weighs else {}
    truth = run(folder, "pytorch")
    rounded = tmp_path / "rounded"
    shutil.copytree(folder, rounded)
    tensors = load_file(rounded / "model.safetensors")
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            table = "embed" in key or "lm_head" in key
            bits = head if table else down if "down_proj" in key else body
            weights = importance.get(key) if bits == 4 else None
            tensors[key] = restored(tensor, 32, bits, weights)
    save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
    meant = run(rounded, "pytorch")
    assert distance(found, meant) < 0.06
    if body == 4:
        assert distance(found, truth) > 2 * distance(found, meant)
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["vocab_size"]
