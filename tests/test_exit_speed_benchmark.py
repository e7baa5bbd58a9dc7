"""`benchmarks.exit_speed`: what it measures side by side, and what its table says of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.exit_speed import arguments, campaigns, make, table
from tests.devices.bench_sample import PER_LAYER, REST, bench, measurement, written
from tests.zoo import make_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError


def asked(tiny: Path, tmp_path: Path, *words: str) -> Any:
    return arguments().parse_args(
        ["bench", str(tiny), "--work", str(tmp_path), "--out", "out", "--at", "2", "4", *words]
    )


def test_every_depth_is_made_once_and_measured_in_one_campaign(tiny: Path, tmp_path: Path) -> None:
    words = ("--runtimes", "pytorch", "llama.cpp")
    for _ in range(2):
        made = asked(tiny, tmp_path, *words)
        make(made)
    assert Checkpoint.open(tmp_path / "at-4").n_layers == 5
    pytorch, gguf = campaigns(made)
    assert [model.name for model in pytorch.models] == ["exits@2", "exits@4", "exits@6"]
    assert [model.name for model in gguf.models] == [
        *("at-2-Q8_0.gguf", "at-4-Q8_0.gguf", "whole-Q8_0.gguf")
    ]
    assert not list(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "exits/exits.json").read_text())["facts"]["tokens"] == 0


def test_work_of_another_model_is_not_taken_for_this_ones(tiny: Path, tmp_path: Path) -> None:
    words = ("--runtimes", "pytorch")
    make(asked(tiny, tmp_path / "work", *words))
    other = make_model("llama", tmp_path / "other")
    with pytest.raises(ShortstackError, match="was made for another model than"):
        make(asked(other, tmp_path / "work", *words))


def test_a_card_adds_graphs_of_written_folders(tiny: Path, tmp_path: Path) -> None:
    made = asked(tiny, tmp_path, "--device", "cuda:0", "--runtimes", "pytorch", "pytorch-graph")
    make(made)
    eager, graph = campaigns(made)
    assert eager.options == ("dtype=float16",)
    assert graph.options == ("dtype=float16", "cuda_graph=on")
    assert graph.models == (tmp_path / "at-2", tmp_path / "at-4", tiny)
    assert graph.words(made)[-2:] == ["--runtime", "pytorch"]


def cells(told: list[str], form: str, layers: int) -> list[str]:
    (row,) = [row for row in told if row.startswith(f"| {form} | {layers} of 30 |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_ratios_are_held_against_layers_and_bytes(tmp_path: Path) -> None:
    cases = [
        measurement(label, n, spec)
        for label, n in (("at-15", 16), ("whole", 30))
        for spec in ("gguf:Q8_0", "onnx:fp32")
    ]
    for case in cases:
        case["artifact"] |= {
            "matmul_params": case["artifact"]["n_params"] - REST,
            "head_params": REST,
        }
        case["kv_bytes_per_token"] = 768 * case["artifact"]["n_layers"]
    told = table([written(tmp_path / "out", bench(cases))])
    row = cells(told, "GGUF Q8_0", 16)
    took, layers = (2 + 16 / 2) / (2 + 30 / 2), 16 / 30
    assert float(row[4].split()[0]) == pytest.approx(took, rel=0.01)
    assert row[2] == "0.533"
    assert float(row[5]) == pytest.approx(took / layers, rel=0.02)
    cache = 768 * (128 + (16 + 1) / 2)
    read = [n * (PER_LAYER + cache) + REST for n in (16, 30)]
    assert float(row[6]) == pytest.approx(read[0] / read[1], abs=1e-3)
    operations = [128 * n * PER_LAYER + REST for n in (16, 30)]
    assert float(row[10]) == pytest.approx(operations[0] / operations[1], abs=1e-3)
    assert cells(told, "ONNX fp32", 30)[4] == "1"
    # its graphs compute the head for every token of the prompt
    headed = [n * PER_LAYER + REST for n in (16, 30)]
    predicted = float(cells(told, "ONNX fp32", 16)[10])
    assert predicted == pytest.approx(headed[0] / headed[1], abs=1e-3)


def of_exits(depth: int, n_layers: int, whole: bool = False) -> dict[str, Any]:
    """As `bench EXITS@DEPTH` records it."""
    made = measurement(f"exits@{depth}", n_layers)
    made["runtime"] = made["runtime_info"]["runtime"] = "pytorch"
    made["artifact"] |= {
        "path": f"exits@{depth}",
        "spec": {"format": "checkpoint", "precision": "float32", "options": {}},
        "source_sha256": made["artifact"]["sha256"] if whole else "0" * 64,
    }
    return made


def test_an_exit_behind_all_layers_but_one_is_not_the_whole_model(tmp_path: Path) -> None:
    """It runs as many layers, and stands first in the record."""
    last, whole = of_exits(29, 30), of_exits(30, 30, whole=True)
    for trial in last["trials"]:
        trial["decode_step_s"] = [2 * step for step in trial["decode_step_s"]]
    told = table([written(tmp_path / "out", bench([last, whole]))])
    rows = [row for row in told if row.startswith("| PyTorch")]
    ratios = [row.strip("|").split("|")[4].strip() for row in rows]
    assert ratios[0] == "1"
    assert float(ratios[1].split()[0]) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("form", ["GGUF Q8_0", "PyTorch float32"])
def test_exits_alone_are_held_against_nothing(tmp_path: Path, form: str) -> None:
    exits = [of_exits(29, 30), of_exits(15, 16)]
    if form == "GGUF Q8_0":
        exits = [measurement("at-29", 30), measurement("at-15", 16)]
    told = table([written(tmp_path / "out", bench(exits))])
    assert not any(row.startswith(f"| {form}") for row in told)
    assert any(f"{form}: only exits were measured (layers: 30, 16)" in row for row in told)


def test_depths_are_no_ratios_where_the_whole_model_failed(tmp_path: Path) -> None:
    whole, half = measurement("whole", 30), measurement("at-15", 16)
    whole |= {
        "trials": [],
        "failure": {"kind": "crash", "message": "out of memory", "phase": "load"},
    }
    told = table([written(tmp_path / "out", bench([half, whole]))])
    assert not any(row.startswith("| GGUF") for row in told)
    assert any("30 layers failed: out of memory" in row for row in told)
