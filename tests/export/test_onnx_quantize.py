"""Integers in ONNX graphs: what is stored, and that onnxruntime reads it as we wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.agreement import distance, run
from tests.zoo import make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import to_onnx
from shortstack.export.onnx_rounding import quantize_rows


def restored(table: NDArray[np.float32], block: int, bits: int) -> NDArray[np.float32]:
    """What codes and scales stand for."""
    codes, scales = quantize_rows(table, block, bits)
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


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("name", ["llama", "phi4-mini", "gemma3", "llama-untied"])
@pytest.mark.parametrize(
    ("target", "options", "head", "down"),
    [
        ("onnx:int8", {}, 8, 8),
        ("onnx:int4", {}, 8, 8),
        ("onnx:int4", {"head": "int4", "wide": "none"}, 4, 4),
    ],
    ids=["int8", "int4", "all int4"],
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
    found = run(to_onnx.export(checkpoint, spec, tmp_path / "out").path, "onnxruntime")
    truth = run(folder, "pytorch")
    rounded = tmp_path / "rounded"
    shutil.copytree(folder, rounded)
    tensors = load_file(rounded / "model.safetensors")
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            table = "embed" in key or "lm_head" in key
            bits = head if table else down if "down_proj" in key else body
            tensors[key] = restored(tensor, 32, bits)
    save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
    meant = run(rounded, "pytorch")
    assert distance(found, meant) < 0.06
    if body == 4:
        assert distance(found, truth) > 2 * distance(found, meant)
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["vocab_size"]
