"""`shortstack trim`: from question files to a folder that the other commands take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.trimming import made_up

from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.prune import PrunePlan
from shortstack.questions import Question

FAST = ["--rows-per-epoch", "40", "--batch-rows", "8", "--drop-per-step", "3", "--rate", "1e-3"]


def write(file: Path, rows: Sequence[Question]) -> str:
    lines = [
        {"id": q.id, "question": q.question, "choices": list(q.choices), "answer": q.answer}
        for q in rows
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def test_from_questions_to_a_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_up(96)
    tune, test = (
        write(tmp_path / "tune.jsonl", rows[:64]),
        write(tmp_path / "test.jsonl", rows[64:]),
    )
    other = write(tmp_path / "other.jsonl", made_up(12, seed=5))
    out = tmp_path / "out"
    command = ["trim", str(tiny), "--tune", tune, "--test", test, "--off-domain", other, "-o"]
    command += [str(out), "--keep", "0.5", "--snapshot", "0.75", "--device", "cpu", *FAST]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["left"] == "6 of 12"
    assert set(said["tests"]) == {"9", "6"}
    assert said["tests"]["6"]["test"]["n"] == 32
    assert said["tests"]["6"]["other.jsonl"]["n"] == 12
    plan = PrunePlan.from_json((out / "plan.json").read_text())
    assert 2 * len(plan.drop) + len(plan.attention) + len(plan.mlp) == 6
    assert Checkpoint.open(out).n_layers == len(plan.keep)
    deeper = PrunePlan.from_json((out / "snapshots" / "9-of-12" / "plan.json").read_text())
    assert 2 * len(deeper.drop) + len(deeper.attention) + len(deeper.mlp) == 3
    curve = json.loads((out / "curve.json").read_text())
    assert [row["left"] for row in curve["curve"]] == [12, 9, 6]
    assert curve["rows"] == {"tune": 52, "scan": 12, "test": 32}
    assert not (tmp_path / ".out.trim").exists()
    written = (out / "curve.json").stat().st_mtime_ns
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == said
    assert (out / "curve.json").stat().st_mtime_ns == written
    assert main(["plan", str(out), "--drop", "1", "-o", str(tmp_path / "p.json"), "-q"]) == 0


def test_what_is_wrong_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_up(40)
    tune, leak = write(tmp_path / "tune.jsonl", rows), write(tmp_path / "leak.jsonl", rows[5:20])
    one = write(tmp_path / "one.jsonl", rows[:1])
    (tmp_path / "columns.jsonl").write_text('{"text": "a"}\n')
    columns = str(tmp_path / "columns.jsonl")
    out = str(tmp_path / "out")
    for options, words in (
        (["--tune", tune, "--test", leak, "--keep", "0.5"], "a leak"),
        (["--tune", tune, "--off-domain", leak, "--keep", "0.5"], "a leak"),
        (["--tune", one, "--keep", "0.5"], "8 different ones are needed"),
        (["--tune", columns, "--keep", "0.5"], "no string field 'question'"),
        (["--tune", tune], "needs one target"),
        (["--tune", tune, "--keep", "0.01"], "11 may go"),
        (["--tune", tune, "--keep", "0.5", "--device", "tpu"], "unknown device 'tpu'"),
        (["--tune", tune, "--keep", "0.5", "--protect-last", "4"], "3 may go"),
        (["--tune", tune, "--max-latency", "0.5", "--protect-first", "6"], "none of 12 units may"),
        (["--tune", tune, "--max-mb", "0.1"], "not met when all goes that may"),
        (["--tune", tune, "--keep", "0.5", "--objective", "mse"], "unknown objective 'mse'"),
        (["--tune", tune, "--keep", "0.5", "--rate", "0"], "--rate is 0.0. Use e.g. 1e-4"),
        (["--tune", tune, "--keep", "0.5", "--snapshot", "7"], "--snapshot is 7.0: give shares"),
    ):
        assert main(["trim", str(tiny), *options, "-o", out]) == 2
        said = capsys.readouterr().err  # no bar: refused before the model is opened
        assert words in said
        assert said.count("\n") == 1
        assert "\\n" not in said
        assert not Path(out).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there_is_missed_before_the_model_is_opened(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = write(tmp_path / "tune.jsonl", made_up(40))
    command = ["trim", str(tiny), "--tune", tune, "--keep", "0.5", "--device", "cuda"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "PyTorch sees no GPU here" in said
    assert said.count("\n") == 1
