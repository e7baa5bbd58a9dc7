"""`shortstack exits` and what other commands make of exits, as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.exits import make_exits

from shortstack.bench.models import benchable
from shortstack.bench.plan import at_depths
from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.devices.fit import kv_values_per_token
from shortstack.errors import ShortstackError
from shortstack.exits.folder import ExitFolder, parse_exits, read_exits
from shortstack.intake import open_model, preview_model, resolve

TRAIN = ("--text", "spdx", "--window-tokens", "64", "--batch-windows", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def exits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ExitFolder:
    return make_exits(tiny, tmp_path_factory.mktemp("exits") / "exits")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    code = main([*map(str, words), "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out) if code == 0 else told.err


def test_train_then_export_then_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exits"
    words = ("exits", "train", tiny, "--at", "4,2", "--tokens", 2048, *TRAIN, "-o", out)
    code, told = run(capsys, *words)
    assert code == 0
    assert told["at"] == [2, 4]
    assert told["steps"] == 4
    assert not list(tmp_path.glob(".exits*"))
    written = (out / "exits.json").stat().st_mtime_ns
    assert run(capsys, *words) == (0, told)
    assert (out / "exits.json").stat().st_mtime_ns == written
    assert read_exits(out).base == tiny.resolve()
    code, told = run(capsys, "exits", "export", out, "--exit", 2, "-o", tmp_path / "at-2")
    assert code == 0
    assert told["n_layers"] == Checkpoint.open(tmp_path / "at-2").n_layers == 3
    assert "2" in (tmp_path / "at-2" / "plan.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--at", "2,6", "--tokens", "64"), "no exit behind 6 layers"),
        (("--at", "2,2", "--tokens", "64"), "must be named once each"),
        (("--at", "2,x", "--tokens", "64"), "Write numbers: 8,15,22"),
        (("--at", "2"), "init last have to be trained, and tokens is 0. Say on how many"),
        (("--at", "2", "--tokens", "64", "--init", "none"), "64 tokens to train on are asked for"),
        (("--at", "2", "--tokens", "64", "--init", "lens"), "unknown init of exits 'lens'"),
        (("--at", "2", "--tokens", "64", "--lr", "0"), "--lr is 0"),
    ],
)
def test_training_refuses_in_one_line(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    code, told = run(capsys, "exits", "train", tiny, *TRAIN, *words, "-o", tmp_path / "out")
    assert code == 2
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_exit_is_a_model_wherever_one_is_named(exits: ExitFolder, tmp_path: Path) -> None:
    named = f"{exits.path}@4"
    assert resolve(named)[0] == "exit"
    preview = preview_model(named)
    assert preview is not None
    made = open_model(named, tmp_path / "model")
    assert (made.n_layers, made.n_bytes) == (5, preview.materialised_bytes)
    with pytest.raises(ShortstackError, match="no exit behind 3 layers. It has 2, 4"):
        open_model(f"{exits.path}@3", tmp_path / "other")


def test_export_of_an_exit_that_is_not_there_is_refused(
    exits: ExitFolder, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--to", "gguf:F32", "-o", tmp_path / "out")
    code, told = run(capsys, "export", exits.path, "--exit", 3, *words)
    assert (code, "It has 2, 4" in told) == (2, True)
    code, told = run(capsys, "export", tiny, "--exit", 3, *words)
    assert (code, "has no exits" in told) == (2, True)


def test_an_exit_exports_proven(
    exits: ExitFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "out"
    code, told = run(capsys, "export", exits.path, "--exit", 2, "--to", "gguf:F32", "-o", out)
    assert code == 0
    assert told["artifact"]["n_layers"] == 3
    assert told["verification"]["kl"] < 1e-4


def test_bench_measures_a_depth_as_a_model_of_its_layers(exits: ExitFolder, tiny: Path) -> None:
    named, depth_tokens = at_depths([str(exits.path)], "2,6")
    assert (named, depth_tokens) == ([f"{exits.path}@2", f"{exits.path}@6"], 0)
    assert len(at_depths([str(exits.path)], "0")[0]) == 3
    shallow, whole = map(benchable, named)
    plain = benchable(str(tiny))
    assert (shallow.n_layers, whole.n_layers) == (3, 6)
    assert whole.weight_bytes_per_token == plain.weight_bytes_per_token
    assert shallow.weight_bytes_per_token < plain.weight_bytes_per_token
    assert len({shallow.sha256, whole.sha256}) == 2
    values = kv_values_per_token(tiny, "checkpoint")
    assert values is not None
    assert kv_values_per_token(shallow.path, "checkpoint") == values // 2


def test_bench_refuses_depths_that_mean_two_things(exits: ExitFolder, tiny: Path) -> None:
    assert at_depths([str(tiny)], "128") == ([str(tiny)], 128)
    with pytest.raises(ShortstackError, match="these models have no exits"):
        at_depths([str(tiny)], "2,4")
    with pytest.raises(ShortstackError, match="Measure them apart"):
        at_depths([str(tiny), str(exits.path)], "2")
    with pytest.raises(ShortstackError, match="no depth 3"):
        at_depths([str(exits.path)], "2,3")
    with pytest.raises(ShortstackError, match="names a depth twice"):
        at_depths([str(exits.path)], "6,2,2")


def test_a_folder_of_exits_without_a_depth_says_how_to_name_one(exits: ExitFolder) -> None:
    with pytest.raises(ShortstackError, match=r"behind 2, 4 layers. Name one: .*exits@2"):
        resolve(str(exits.path))


def test_the_terminal_tells_what_each_depth_takes(
    exits: ExitFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["exits", "choose", str(exits.path), "--max-latency-ms", "60000", "--threads", "1"]
    assert main([*words, "--prompt-tokens", "8"]) == 0
    told = capsys.readouterr().out
    assert "depth: 6" in told
    assert re.search(r"^predicted_ms: [\d.]+ at 2, [\d.]+ at 4, [\d.]+ at 6$", told, re.MULTILINE)


def test_lists_of_exits() -> None:
    assert parse_exits("8, 15,22") == (8, 15, 22)
    with pytest.raises(ShortstackError, match="cannot read layers '8-15'"):
        parse_exits("8-15")
