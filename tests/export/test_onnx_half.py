"""Quantized ONNX graphs that compute in float16: what CUDA runs, proved on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from shortstack.artifact import ExportSpec
from shortstack.certify import certify, make_reference
from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.errors import ShortstackError
from shortstack.export import to_onnx
from shortstack.export.onnx_rounding import quantize_rows
from shortstack.verification import Bounds

MakeVariant = Callable[..., Checkpoint]
Distance = Callable[[Checkpoint, Path, str], tuple[float, float]]
WINDOWS = [[(37 * row + 11 * column) % 504 + 8 for column in range(64)] for row in range(8)]
HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def spec(precision: str, activations: str = "float16", **options: str) -> ExportSpec:
    return ExportSpec.parse(f"onnx:{precision}", activations=activations, **options)


def restored(table: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float64], ...]:
    """What codes and float16 scales stand for, and the scales."""
    codes, scales = quantize_rows(table, 32, bits, half=True)
    assert scales.dtype == np.float16
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], 32)
    whole = codes.astype(np.float64) - (1 << (bits - 1))
    return (whole * scales[..., None].astype(np.float64)).reshape(table.shape), scales


@pytest.mark.parametrize("builder", ["mobius", "genai"])
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("int4", 0.2)])
def test_codes_are_those_of_float32_and_all_else_is_half(
    precision: str,
    bound: float,
    builder: str,
    checkpoint: Checkpoint,
    distance: Distance,
    tmp_path: Path,
) -> None:
    graphs = {}
    for activations in ("float32", "float16"):
        out = tmp_path / activations
        out.mkdir()
        wanted = spec(precision, activations, builder=builder)
        made = to_onnx.export(checkpoint, wanted, out, calibration=WINDOWS)
        predicted = to_onnx.predict(checkpoint, wanted)["size_bytes"]
        assert predicted == pytest.approx(made.size_bytes, rel=0.12)
        graphs[activations] = onnx.load(out / "model.onnx").graph
    full, half = (
        {t.name: numpy_helper.to_array(t) for t in graphs[name].initializer}
        for name in ("float32", "float16")
    )
    for name, codes in full.items():
        if name.endswith(".codes"):
            np.testing.assert_array_equal(codes, half[name])
        if name.endswith(".scales"):
            np.testing.assert_array_equal(codes.astype(np.float16), half[name])
    assert not [name for name, array in half.items() if array.dtype == np.float32]
    ends = [*graphs["float16"].input, *graphs["float16"].output]
    kinds = {value.type.tensor_type.elem_type for value in ends}
    assert (HALF in kinds, SINGLE in kinds) == (True, False)
    folder = tmp_path / "float16"
    for runtime in ("onnxruntime", "onnxruntime-genai"):
        assert max(distance(checkpoint, folder, runtime)) < bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 3e-8])
def test_small_scales_lose_no_more_than_float16_itself(size: float, bits: int) -> None:
    table = (np.random.default_rng(0).normal(size=(64, 256)) * size).astype(np.float32)
    table[0] = 0
    found, scales = restored(table, bits)
    peaks = np.abs(table.reshape(64, 8, 32)).max(-1)
    exact = peaks / (1 << (bits - 1))
    assert not scales[0].any()
    assert scales[1:].all()
    # a step is as wide as in float32, or one float16 wider
    steps = np.abs(scales.astype(np.float64))
    assert (steps <= exact * (1 + 2.0**-11) + 2.0**-24).all()
    off = np.abs(found - table).reshape(64, 8, 32)
    assert (off <= 1.07 * steps[..., None]).all()  # the largest of the other sign: a step too far
    assert (off <= 0.57 * steps[..., None]).mean() > 0.96


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_option_is_of_quantized_precisions(precision: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ShortstackError, match=f"{precision} has no option 'activations'"):
        to_onnx.check(checkpoint, spec(precision))


def test_it_asks_for_text_as_float16_does(checkpoint: Checkpoint) -> None:
    assert to_onnx.calibrates(checkpoint, spec("int8"))
    assert to_onnx.calibrates(checkpoint, spec("int4", imatrix="no"))
    assert not to_onnx.calibrates(checkpoint, spec("int8", "float32"))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_activations_beyond_float16_are_refused(
    precision: str, make_variant: MakeVariant, tmp_path: Path
) -> None:
    def loud(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] *= 3e5

    checkpoint = make_variant(edit=loud)
    with pytest.raises(ShortstackError, match=r"beyond the 65504 .* with activations=float32"):
        to_onnx.export(checkpoint, spec(precision), tmp_path, calibration=WINDOWS)
    assert not list(tmp_path.iterdir())


def test_a_scale_beyond_float16_is_refused(make_variant: MakeVariant, tmp_path: Path) -> None:
    def huge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] *= 1e10

    with pytest.raises(ShortstackError, match=r"float16 does not hold their scale"):
        to_onnx.export(make_variant(edit=huge), spec("int8"), tmp_path)


def test_it_is_certified_and_measured_on_the_cpu(
    checkpoint: Checkpoint, tokens: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    artifact = to_onnx.export(checkpoint, spec("int4"), out, calibration=[tokens])
    windows = [tokens[:48], tokens[48:]]
    reference = make_reference(checkpoint, windows, tmp_path / "reference.npy", threads=1)
    bounds = Bounds.of(artifact.spec, max_perplexity_ratio=1.5)
    for runtime in ("onnxruntime", "onnxruntime-genai"):
        found = certify(artifact, windows, reference, bounds, threads=1, runtime=runtime)
        assert found.kl < 0.2
    small = ["--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "1", "--threads", "1"]
    command = ["bench", str(out), "-o", str(tmp_path / "bench"), *small, "--no-ceilings"]
    assert main([*command, "--memory-repeats", "1", "--json"]) == 0
    record = json.loads((tmp_path / "bench" / "bench.json").read_text(encoding="utf-8"))
    assert {m["artifact"]["spec"]["precision"] for m in record["measurements"]} == {"int4"}
    assert {m["runtime"] for m in record["measurements"]} == {"onnxruntime", "onnxruntime-genai"}
