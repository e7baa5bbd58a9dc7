"""`shortstack report DIR... -o OUT`: what it writes, what it refuses, what it leaves as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.cli import main
from shortstack.devices.report import to_json

from .bench_sample import evaluation, laptop_run, server_run, written
from .sample import sample

FILES = {"report.html", "report.md", "report.csv", "llama-bench.json", "shortstack.json"}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return [
        str(written(tmp_path / "laptop", laptop_run())),
        str(written(tmp_path / "server", server_run())),
    ]


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("shortstack: ")
    assert told.count("\n") == 1
    return told


def test_records_of_two_machines_become_one_report(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["report", *folders, folders[0], "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {p.name for p in out.iterdir()} == FILES
    assert (told["runs"], told["measurements"], told["told_once"]) == (2, 8, 1)
    assert len(told["machines"]) == 2
    assert main(["report", *folders, "-o", str(out)]) == 0


def test_an_evaluation_is_taken_from_its_folder(folders: list[str], tmp_path: Path) -> None:
    judged = evaluation(laptop_run()["measurements"], [8.0, 9.0, 12.0, 8.0, 9.0])
    written(tmp_path / "eval", judged, "eval.json")
    out = tmp_path / "merged"
    assert main(["report", *folders, "--eval", str(tmp_path / "eval"), "-o", str(out)]) == 0
    assert "perplexity on news" in (out / "report.md").read_text(encoding="utf-8")


def test_a_run_and_a_bench_go_together(folders: list[str], tmp_path: Path) -> None:
    run = written(tmp_path / "run", json.loads(to_json(sample())), "report.json")
    out = tmp_path / "merged"
    assert main(["report", str(run), *folders, "-o", str(out)]) == 0
    assert "shortstack run demo -o out" in (out / "report.md").read_text(encoding="utf-8")


def test_one_run_alone_keeps_its_own_report_unless_merging_is_asked_for(tmp_path: Path) -> None:
    run = written(tmp_path / "run", json.loads(to_json(sample())), "report.json")
    assert main(["report", str(run), "-o", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own" / "report.json").is_file()
    assert main(["report", str(run), "--merge", "-o", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "report.csv").is_file()


def test_merging_needs_a_place(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Add: -o OUT" in fails(["report", *folders], capsys)
    assert "Add: -o OUT" in fails(["report", folders[0]], capsys)


def test_a_bad_record_leaves_the_old_report_as_it_was(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["report", *folders, "-o", str(out), "-q"]) == 0
    before = (out / "report.html").read_bytes()
    (tmp_path / "server" / "bench.json").write_text('{"schema": 2, ', encoding="utf-8")
    assert "server/bench.json" in fails(["report", *folders, "-o", str(out)], capsys)
    assert (out / "report.html").read_bytes() == before


def test_a_report_never_overwrites_what_is_not_one(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x", encoding="utf-8")
    told = fails(["report", *folders, "-o", str(tmp_path / "mine")], capsys)
    assert "was not made by shortstack" in told
    assert "overlap" in fails(["report", *folders, "-o", folders[0]], capsys)


def test_an_evaluation_that_is_not_there_is_told(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", *folders, "-o", str(tmp_path / "out"), "--eval"]
    assert "Run: shortstack eval" in fails([*words, str(tmp_path / "nowhere")], capsys)
    bench = str(tmp_path / "laptop" / "bench.json")
    assert "bench.json is no evaluation" in fails([*words, bench], capsys)
    assert not (tmp_path / "out").exists()
