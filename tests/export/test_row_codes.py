"""A checkpoint with row codes becomes files that hold these codes: no weight is rounded again."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from tests.packed_models import write_coded
from tests.zoo import make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.export.weights import Weights
from shortstack.intake import open_model

Distance = Callable[[Checkpoint, Path, str], tuple[float, float]]


def export(checkpoint: Checkpoint, text: str, out: Path, **options: str) -> Path:
    out.mkdir()
    spec = ExportSpec.parse(text, **options)
    return exporter(spec.format).export(checkpoint, spec, out).path


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Checkpoint:
    return write_coded(tiny, tmp_path_factory.mktemp("coded") / "model")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "olmo2", "granite"])
def test_a_stock_q8_0_file_dequantizes_to_codes_times_steps(name: str, tmp_path: Path) -> None:
    """Row by row, as llama.cpp wants the rows of some projections in another order."""
    checkpoint = write_coded(make_model(name, tmp_path / "plain"), tmp_path / "model")
    file = export(checkpoint, "gguf:Q8_0", tmp_path / "gguf")
    found: Counter[bytes] = Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) == 2:
            assert tensor.tensor_type.name == "Q8_0"
            rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found.update(row.tobytes() for row in rows)
        else:
            assert tensor.tensor_type.name == "F32"
    stored = Weights(checkpoint)
    matrices = [n for n, info in checkpoint.tensors.items() if len(info.shape) == 2]
    assert found == Counter(row.tobytes() for n in matrices for row in np.asarray(stored.stored(n)))


def test_codes_of_weights_that_were_edited_are_refused(coded: Checkpoint, tmp_path: Path) -> None:
    """The file would hold the codes, not the weights of the checkpoint that it is named after."""
    folder = tmp_path / "edited"
    shutil.copytree(coded.path, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("gate_proj.weight"))
    tensors[name][0, 0] += 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "gguf").mkdir()
    with pytest.raises(ShortstackError, match=rf"the codes of {name} are not its weights"):
        exporter("gguf").export(
            Checkpoint.open(folder), ExportSpec("gguf", "Q8_0"), tmp_path / "gguf"
        )


def test_every_weight_is_at_its_place(coded: Checkpoint, tmp_path: Path) -> None:
    again = open_model(str(export(coded, "gguf:Q8_0", tmp_path / "gguf")), tmp_path / "again")
    wanted, found = Weights(coded), Weights(again)
    assert set(again.tensors) == set(coded.tensors)
    for tensor in coded.tensors:
        assert np.array_equal(found.stored(tensor), wanted.stored(tensor)), tensor


def test_the_file_is_half_its_plain_neighbours_and_runs(
    coded: Checkpoint, tmp_path: Path, distance: Distance
) -> None:
    file = export(coded, "gguf:Q8_0", tmp_path / "gguf")
    matrices = sum(info.n_bytes for info in coded.tensors.values() if len(info.shape) == 2)
    assert file.stat().st_size < matrices * 34 / 32 / 4 + 60_000
    assert max(distance(coded, file, "llama.cpp")) < 2e-3  # activations are Q8_0, the cache F16


def test_matrices_without_codes_are_rounded(tiny: Path, tmp_path: Path) -> None:
    checkpoint = write_coded(tiny, tmp_path / "model", skip=("embed", "down_proj"))
    again = open_model(str(export(checkpoint, "gguf:Q8_0", tmp_path / "gguf")), tmp_path / "again")
    wanted, found = Weights(checkpoint), Weights(again)
    for tensor in checkpoint.tensors:
        one, other = found.stored(tensor), wanted.stored(tensor)
        if "embed" in tensor or "down_proj" in tensor:
            assert 0 < np.abs(one - other).max() <= np.abs(other).max() / 200
        else:
            assert np.array_equal(one, other)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    checkpoint = write_coded(tmp_path / "plain", tmp_path / "model")
    spec = ExportSpec.parse("gguf:Q8_0")
    with pytest.raises(ShortstackError, match="rows of 48, Q8_0 needs multiples of 32"):
        exporter("gguf").check(checkpoint, spec)


def test_options_that_would_round_codes_are_refused(coded: Checkpoint) -> None:
    with pytest.raises(ShortstackError, match="option head does not go with row codes"):
        exporter("gguf").check(coded, ExportSpec.parse("gguf:Q8_0", head="Q5_0"))


@pytest.mark.parametrize(
    "options", [{}, {"block": "64", "activations": "float16"}], ids=["float32", "float16"]
)
def test_int8_onnx_holds_the_very_codes_and_steps(
    options: dict[str, str], coded: Checkpoint, tmp_path: Path
) -> None:
    folder = export(coded, "onnx:int8", tmp_path / "onnx", **options)
    model = onnx.load(folder / "model.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    stored = Weights(coded)
    matrices = [n for n, info in coded.tensors.items() if len(info.shape) == 2]
    known = {row.tobytes() for n in matrices for row in np.asarray(stored.stored(n))}
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    assert len(names) >= 7 * coded.n_layers - 3 * coded.n_layers  # builders may fuse projections
    seen = 0
    for name in names:
        codes, scales = tensors[f"{name}.codes"].astype(np.int16) - 128, tensors[f"{name}.scales"]
        weights = (codes * scales.astype(np.float32)[..., None]).reshape(codes.shape[0], -1)
        assert all(row.tobytes() in known for row in weights.astype(np.float32)), name
        seen += weights.size
    assert seen == sum(coded.tensors[name].n_bytes // 4 for name in matrices)


def test_int8_onnx_of_row_codes_computes_what_the_checkpoint_does(
    coded: Checkpoint, tmp_path: Path, distance: Distance
) -> None:
    folder = export(coded, "onnx:int8", tmp_path / "onnx")
    assert max(distance(coded, folder, "onnxruntime")) < 2e-3  # its products are int8


def test_a_sidecar_of_another_model_is_refused(
    coded: Checkpoint, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copyfile(coded.path / SIDECAR, tmp_path / "model" / SIDECAR)
    with pytest.raises(ShortstackError, match="does not belong to a float32 matrix"):
        exporter("gguf").check(Checkpoint.open(tmp_path / "model"), ExportSpec.parse("gguf:Q8_0"))
