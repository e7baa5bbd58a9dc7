"""An export holds chunks of tensors, never a whole one, and predicts what it takes."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.make_synthetic import make_synthetic

from shortstack import child
from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint, hash_files
from shortstack.export import exporter, gguf_chunks, to_gguf
from shortstack.footprint import against, measured

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Few tensors, three of them of 168 MB each in float32."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_synthetic(folder, "tiny", num_hidden_layers=1, hidden_size=512, intermediate_size=81920)
    return Checkpoint.open(folder)


def export_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a child, which holds nothing of the tests."""
    checkpoint = Checkpoint.open(Path(request["model"]))
    spec = ExportSpec.parse(request["spec"], **request["options"])
    format_ = exporter(spec.format)
    with measured() as meter:
        format_.export(checkpoint, spec, Path(request["out"]), calibration=request["windows"])
    predicted = format_.predict(checkpoint, spec)
    return against(meter.footprint, predicted.get("writing_ram_bytes", predicted["peak_ram_bytes"]))


def run_export(
    checkpoint: Checkpoint,
    target: str,
    out: Path,
    windows: Sequence[Sequence[int]] = (),
    **options: str,
) -> dict[str, Any]:
    return child.call(
        "tests.export.test_memory:export_here",
        {
            "model": str(checkpoint.path),
            "spec": target,
            "options": options,
            "out": str(out),
            "windows": windows,
        },
        timeout_s=300,
        what="the export",
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )


@linux
@pytest.mark.parametrize("precision", ["F32", "F16", "Q4_0"])
def test_no_tensor_is_held_whole_and_the_prediction_holds(
    precision: str, wide: Checkpoint, tmp_path: Path
) -> None:
    facts = run_export(wide, f"gguf:{precision}", tmp_path)
    largest = max(4 * math.prod(info.shape) for info in wide.tensors.values())
    assert facts["peak_anon_bytes"] < facts["predicted_peak_bytes"] < largest
    assert facts["predicted_peak_bytes"] < 2 * facts["peak_anon_bytes"]


@linux
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_onnx_holds_one_tensor_and_what_builds_the_graph(
    precision: str, wide: Checkpoint, tmp_path: Path
) -> None:
    blind = {"imatrix": "no"} if precision == "int4" else {}
    facts = run_export(wide, f"onnx:{precision}", tmp_path, (), **blind)
    assert facts["peak_anon_bytes"] < facts["predicted_peak_bytes"]
    assert facts["predicted_peak_bytes"] < 2 * facts["peak_anon_bytes"]


@linux
def test_rounding_with_importance_takes_what_is_foretold(tmp_path: Path) -> None:
    """The pass over the text, which takes most, and the parts that are rounded."""
    folder = tmp_path / "model"
    make_synthetic(folder, "tiny", num_hidden_layers=1, hidden_size=512, intermediate_size=16384)
    windows = [[(7 * i + 13 * row) % 500 for i in range(256)] for row in range(8)]
    (tmp_path / "out").mkdir()
    facts = run_export(Checkpoint.open(folder), "onnx:int4", tmp_path / "out", windows)
    assert facts["peak_anon_bytes"] < facts["predicted_peak_bytes"]
    assert facts["predicted_peak_bytes"] < 2 * facts["peak_anon_bytes"]


@pytest.mark.parametrize("precision", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama-untied", "llama-biases", "wide-heads"])
def test_where_a_tensor_is_cut_into_chunks_changes_nothing(
    precision: str,
    name: str,
    make_variant: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, spec = make_variant(name), ExportSpec.parse(f"gguf:{precision}")
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = to_gguf.export(checkpoint, spec, tmp_path / "whole")
    monkeypatch.setattr(gguf_chunks, "CHUNK_WEIGHTS", 5 * 64)  # rows of 64 and 128, heads of 16
    cut = to_gguf.export(checkpoint, spec, tmp_path / "cut")
    assert cut.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("precision", ["F16", "Q4_0"])
def test_the_hash_taken_while_writing_is_the_files(
    precision: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    artifact = to_gguf.export(checkpoint, ExportSpec.parse(f"gguf:{precision}"), tmp_path)
    assert artifact.sha256 == hash_files(tmp_path, [artifact.path.name])
