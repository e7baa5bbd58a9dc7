"""A recipe that prunes and quantizes: packed files and Q8_0 files of the same codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.test_pipeline import Recorder

from shortstack import pipeline, steps
from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.cli import main
from shortstack.errors import ShortstackError
from shortstack.export.weights import Weights
from shortstack.floats import from_bfloat16
from shortstack.forecast import forecast
from shortstack.intake import open_model
from shortstack.manifest import read_manifest
from shortstack.packed.read import open_packed
from shortstack.packed.unpack import unpack_folder
from shortstack.recipe import Recipe, parse_recipe
from shortstack.text import open_corpus

EXPORTS = [
    {"to": "packed"},
    {"to": "gguf:Q8_0", "quantized": True},
    {"to": "gguf:Q8_0"},
]
SLUGS = ("packed-lossless-quantized", "gguf-q8_0-quantized", "gguf-q8_0")


def data(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "text": "spdx",
        "prune": {"method": "influence", "drop": 2, "windows": 4, "window_tokens": 64},
        "quantize": {"bits": 5, "windows": 8, "window_tokens": 64},
        "export": EXPORTS,
        "verify": {"windows": 4, "window_tokens": 64, "decode_tokens": 16},
        "bench": {"prompt_tokens": 16, "decode_tokens": 8, "repeats": 2, "threads": 1},
        **changes,
    }


def recipe(model: Path, **changes: Any) -> Recipe:
    return parse_recipe(data(model, **changes), "test.yaml")


def floats(weights: Weights, name: str) -> NDArray[np.float32]:
    """Norms are bfloat16 in the folder and F32 in a GGUF file."""
    stored = np.asarray(weights.stored(name))
    return from_bfloat16(stored) if stored.dtype == np.uint16 else stored


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, pipeline.run(recipe(tiny), out, Recorder())


def test_both_models_come_as_packed_and_q8_0_of_the_same_codes(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = done
    assert result["failures"] == []
    for label, n_layers in (("original", 6), ("pruned", 4)):
        coded = Checkpoint.open(out / label / "quantized")
        assert coded.n_layers == n_layers
        for slug in SLUGS[:2]:
            made = read_manifest(out / label / slug)
            assert made is not None
            assert made["artifact"]["source_sha256"] == coded.sha256
        file = next((out / label / SLUGS[1]).glob("*.gguf"))
        again = open_model(str(file), tmp_path / f"{label}-again")
        wanted, found = Weights(coded), Weights(again)
        assert set(again.tensors) == set(coded.tensors)
        for name in coded.tensors:
            assert np.array_equal(floats(found, name), floats(wanted, name)), name
        packed = open_packed(out / label / SLUGS[0] / "model.packed.safetensors")
        folder = tmp_path / label
        folder.mkdir()
        unpack_folder(packed, folder)
        assert (folder / SIDECAR).read_bytes() == (coded.path / SIDECAR).read_bytes()


def test_the_report_has_them_beside_the_plain_exports(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    entries = json.loads((out / "report.json").read_text())["entries"]
    found = {(e["label"], e["spec"]): e for e in entries}
    assert found.keys() == {(label, s) for label in ("original", "pruned") for s in SLUGS}
    for (label, spec), entry in found.items():
        assert entry["verification"]["perplexity"] > 1
        packed = spec.startswith("packed")
        assert (entry["measurement"]["runtime"] == "pytorch-packed") == packed
        if spec == "gguf-q8_0":  # quality is that of the models before they are quantized
            reference = entry["verification"]["reference_perplexity"]
            assert reference == result["perplexity"][label]
    shas = {e["measurement"]["artifact"]["sha256"] for e in entries if e["measurement"]}
    assert len(shas) == 2 * len(SLUGS)
    said = (out / "report.md").read_text()
    assert r"GGUF Q8\_0, quantized" in said
    assert "pytorch-packed" in said


def test_a_second_run_keeps_every_step(done: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    display = Recorder()
    pipeline.run(recipe(tiny), done[0], display)
    assert display.steps == ["Open the model"]


def test_a_dry_run_says_what_it_takes(done: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    rows = {row["step"]: row for row in forecast(recipe(tiny))["steps"]}
    for label in ("original", "pruned"):
        for name in ("quantized", *SLUGS):
            folder = done[0] / label / name
            size = sum(f.stat().st_size for f in folder.iterdir() if f.name != "shortstack.json")
            row = rows[f"{label}/{name}"]
            assert row["size_bytes"] == pytest.approx(size, rel=0.25), (label, name)
            assert row["peak_ram_bytes"] > 0
            assert row["disk_bytes"] >= row["size_bytes"]


def test_a_cut_of_a_quantized_folder_carries_no_stale_codes(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    source = done[0] / "original" / "quantized"
    assert (source / SIDECAR).is_file()
    assert main(["prune", str(source), "--drop", "2", "-o", str(out), "-q"]) == 0
    assert not (out / SIDECAR).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": {"bits": 9}}, "quantize.bits: Input should be less than or equal to 8"),
        ({"quantize": None}, "there is no quantize step. Add one"),
        ({"quantize": {"bit": 4}}, "Did you mean 'bits'"),
        ({"export": [{"to": "packed", "quantized": False}]}, "packed is of the quantized models"),
        ({"export": [{"to": "gguf:Q4_0", "quantized": True}]}, "would round the quantized weights"),
        ({"export": [EXPORTS[1], EXPORTS[1]]}, "gguf-q8_0-quantized is listed twice"),
    ],
)
def test_mistakes_are_told(tiny: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ShortstackError, match=said) as error:
        recipe(tiny, **changes)
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_told_before_anything_is_made(tiny: Path, tmp_path: Path) -> None:
    wrong = recipe(tiny, quantize={"bits": 5, "method": "plane"})
    with pytest.raises(ShortstackError, match="Did you mean 'plain'"):
        pipeline.run(wrong, tmp_path / "out", Recorder())
    assert not (tmp_path / "out").exists()


def test_keys_of_plain_exports_are_those_of_earlier_versions(tiny: Path) -> None:
    wanted = recipe(tiny, quantize=None, export=[{"to": "gguf:Q8_0"}]).export[0]
    inputs = steps.export_inputs(Checkpoint.open(tiny), wanted, open_corpus("spdx"))
    assert inputs["export"] == {"to": "gguf:Q8_0", "options": {}, "max_perplexity_ratio": 1.25}
