"""The whole run on the tiny model, with the real exporters, runtimes and processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shortstack import pipeline
from shortstack.checkpoint import Checkpoint
from shortstack.devices.report import ReportData
from shortstack.manifest import read_manifest
from shortstack.progress import OnProgress, silent
from shortstack.recipe import Recipe, parse_recipe

SPECS = ("gguf:F16", "gguf:Q8_0", "onnx:fp32")
SLUGS = ("gguf-f16", "gguf-q8_0", "onnx-fp32")


def recipe(model: Path, **changes: Any) -> Recipe:
    data = {
        "model": str(model),
        "text": "spdx",
        "prune": {"method": "influence", "drop": 2, "windows": 4, "window_tokens": 64},
        "export": [{"to": spec} for spec in SPECS],
        "verify": {"windows": 4, "window_tokens": 64, "decode_tokens": 16},
        "bench": {"prompt_tokens": 16, "decode_tokens": 8, "repeats": 2, "threads": 1},
        **changes,
    }
    return parse_recipe(data, "test.yaml")


class Recorder:
    """A Display that remembers; told to, it sends this process a real SIGINT inside a step."""

    def __init__(self, interrupt_in: str | None = None) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.interrupt_in = interrupt_in

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[OnProgress]:
        self.steps.append(title)
        if self.interrupt_in == title:
            yield lambda done, total: signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # a step that reports no progress
        yield silent

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, pipeline.run(recipe(tiny), out, Recorder(), "shortstack run test.yaml -o OUT")


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if "partial" in p.name or p.name.startswith(".")]


def test_a_run_ends_with_a_report_and_no_failure(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    assert result["failures"] == []
    for name in ("report.html", "report.md", "report.json"):
        assert (out / name).stat().st_size > 1000
    assert not (out / "reference").exists()
    assert leftovers(out) == []


def test_every_folder_says_how_it_was_made(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    folders = [".", "plan", "pruned/checkpoint", "bench"]
    folders += [f"{label}/{slug}" for label in ("original", "pruned") for slug in SLUGS]
    for folder in folders:
        manifest = read_manifest(out / folder)
        assert manifest is not None, folder
        assert manifest["version"]


def test_exact_artifacts_are_held_to_the_hard_bound(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    for label in ("original", "pruned"):
        for slug in ("gguf-f16", "onnx-fp32"):
            manifest = read_manifest(out / label / slug)
            assert manifest is not None
            assert manifest["bounds"]["max_kl"] == 1e-4
            assert manifest["verification"]["kl_decode"] < 1e-4
            assert manifest["verification"]["top1"] > 0.99
            footprint = manifest["footprint"]
            assert footprint["wall_s"] > 0
            peak = footprint["peak_anon_bytes"]
            assert peak is None or 0 < peak < footprint["predicted_peak_bytes"]


def test_the_pruned_checkpoint_is_smaller_and_keeps_its_tokenizer(
    done: tuple[Path, dict[str, Any]], tiny: Path
) -> None:
    out, result = done
    pruned = Checkpoint.open(out / "pruned" / "checkpoint")
    assert pruned.n_layers == 4
    assert len(result["dropped_layers"]) == 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (pruned.path / name).read_bytes() == (tiny / name).read_bytes()


def test_fewer_layers_read_fewer_bytes(done: tuple[Path, dict[str, Any]]) -> None:
    for comparison in done[1]["comparisons"]:
        assert comparison["bytes_per_token_ratio"] > 1.3
        assert comparison["decode_speedup"]["n"] == 2


def test_the_report_reads_back(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    data = ReportData.from_dict(json.loads((out / "report.json").read_text()))
    assert len(data.entries) == 2 * len(SPECS)
    assert data.quality is not None
    assert data.quality.pruned_perplexity == result["perplexity"]["pruned"]
    assert data.quality.ratio > 1.0


def test_a_second_run_keeps_every_step(done: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    out, _ = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out}
    display = Recorder()
    pipeline.run(recipe(tiny), out, display)
    assert display.steps == ["Open the model"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_cut_keeps_what_did_not_change(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    display = Recorder()
    changed = {"method": "explicit", "drop": "2,3"}
    result = pipeline.run(recipe(tiny, prune=changed), out, display)
    assert result["dropped_layers"] == [2, 3]
    assert [n for n in display.notes if n.startswith("Export and verify original")]
    assert "Export and verify pruned gguf-f16" in display.steps


def test_a_failed_measurement_is_tried_again(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    file = out / "bench" / "shortstack.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "failures": ["it crashed"]}))
    display = Recorder()
    assert pipeline.run(recipe(tiny), out, display)["failures"] == []
    assert display.steps == ["Open the model", "Measure, in turn"]


STAGES = {
    "Open the model": ".",
    "Choose layers": "plan",
    "Cut the layers": "pruned/checkpoint",
    "Run the original model in PyTorch": "original/gguf-f16",
    "Export and verify original gguf-f16": "original/gguf-f16",
    "Export and verify original onnx-fp32": "original/onnx-fp32",
    "Measure, in turn": "bench",
}
"""Title of a step, and the folder whose absence makes it run."""


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_a_stage_leaves_no_half_result(
    stage: str, done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if stage != "Open the model":
        shutil.copytree(done[0], out)
        shutil.rmtree(out / STAGES[stage])
    display = Recorder(interrupt_in=stage)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe(tiny), out, display)
    assert display.steps[-1] == stage
    assert leftovers(tmp_path) == []
    assert not (out / STAGES[stage]).exists()


def test_a_gate_that_is_missed_removes_the_file_and_is_reported(tiny: Path, tmp_path: Path) -> None:
    # Q4_0 of a model this small costs perplexity; no rounding passes a gate this tight.
    strict = [{"to": "gguf:Q4_0", "max_perplexity_ratio": 1.0001}, {"to": "gguf:F16"}]
    out = tmp_path / "out"
    result = pipeline.run(recipe(tiny, export=strict), out, Recorder())
    assert any("the gate is 1.0001" in failure for failure in result["failures"])
    assert not (out / "pruned" / "gguf-q4_0").exists()
    assert (out / "pruned" / "gguf-f16").is_dir()
    assert "the gate is 1.0001" in (out / "report.md").read_text()


def test_a_gate_tightened_later_removes_what_passed_the_looser_one(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    assert (out / "original" / "gguf-q8_0").is_dir()
    strict = [{"to": "gguf:Q8_0", "max_perplexity_ratio": 1.0000001}]
    result = pipeline.run(recipe(tiny, export=strict), out, Recorder())
    for label in ("original", "pruned"):
        manifest = read_manifest(out / label / "gguf-q8_0")
        assert manifest is None or manifest["bounds"]["max_perplexity_ratio"] == 1.0000001
    # PyTorch measured both models, whatever became of the files.
    assert result["perplexity"] is not None
