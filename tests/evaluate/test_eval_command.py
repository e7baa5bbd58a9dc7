"""`shortstack eval` from end to end: formats, comparison, going on, bad input."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.conftest import write_rows
from tests.exits import make_exits

from shortstack.cli import main
from shortstack.evaluate.generation import open_prompts
from shortstack.evaluate.subsets import subset
from shortstack.manifest import MANIFEST


def evaluated(out: Path, *words: object) -> dict[str, Any]:
    """Run the command; what eval.json then holds."""
    assert main(["eval", "--threads", "1", *map(str, words), "-o", str(out), "--quiet"]) == 0
    data: dict[str, Any] = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    return data


def by_model(data: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {result["model"]: result for result in data["results"] if result["set"] == name}


@pytest.fixture(scope="session")
def compared(
    tiny: Path,
    exports: dict[str, Path],
    rows: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny model and its two artifacts, against itself and a cut of it, on every kind."""
    place = tmp_path_factory.mktemp("eval")
    assert main(["prune", str(tiny), "--drop", "3", "-o", str(place / "cut"), "--quiet"]) == 0
    evaluated(
        place / "out",
        *(exports["gguf"], exports["onnx"], place / "cut", "--against", tiny),
        *("--choice", rows["choice"], "--choice", rows["classes"], "--text", rows["text"]),
        *("--generate", rows["generation"], "--limit", 12, "--window-tokens", 64),
    )
    return place / "out"


def test_artifacts_agree_with_their_checkpoint_and_a_cut_does_not(compared: Path) -> None:
    data = json.loads((compared / "eval.json").read_text(encoding="utf-8"))
    assert data["original"] == "tiny"
    labels = [model["label"] for model in data["models"]]
    runtimes = [model["runtime"] for model in data["models"]]
    assert runtimes == ["pytorch", "llama.cpp", "onnxruntime", "pytorch"]
    text = by_model(data, "licence-text")
    words = by_model(data, "licence-generation")
    choice = by_model(data, "licence-choice")
    for artifact in labels[1:3]:
        assert text[artifact]["against"]["kl_nats"]["estimate"] < 1e-3
        assert text[artifact]["against"]["same_top"]["estimate"] > 0.98
        assert text[artifact]["against"]["ratio"]["estimate"] == pytest.approx(1, abs=1e-3)
        assert choice[artifact]["against"]["difference"]["estimate"] == 0
        assert choice[artifact]["against"]["stability"] == pytest.approx(1)
        assert words[artifact]["rows"] == words["tiny"]["rows"]
    assert text["cut"]["against"]["kl_nats"]["estimate"] > 0.01
    assert text["cut"]["against"]["ratio"]["low"] > 1
    assert "against" not in text["tiny"]


def test_no_record_holds_a_folder_of_the_machine(compared: Path, rows: dict[str, Path]) -> None:
    records = [*compared.rglob("*.json"), compared / "eval.md"]
    assert len(records) > 10
    for folder in (compared.parent, Path(rows["text"]).parent, Path.home(), Path.cwd()):
        for record in records:
            assert str(folder) not in record.read_text(encoding="utf-8"), record
    data = json.loads((compared / "eval.json").read_text(encoding="utf-8"))
    places = [*(model["path"] for model in data["models"]), *(one["path"] for one in data["sets"])]
    assert all(place and Path(place).name == place for place in places)


def test_every_accuracy_has_n_chance_and_interval(compared: Path) -> None:
    data = json.loads((compared / "eval.json").read_text(encoding="utf-8"))
    for name in ("licence-choice", "licence-classes"):
        for result in by_model(data, name).values():
            summary = result["summary"]
            assert summary["n"] == len(result["rows"]) == 12
            assert 0 <= summary["accuracy"]["low"] <= summary["accuracy"]["estimate"]
            assert summary["accuracy"]["estimate"] <= summary["accuracy"]["high"] <= 1
            right = sum(row["chosen"] == row["answer"] for row in result["rows"])
            assert summary["accuracy"]["estimate"] == pytest.approx(right / 12)
            for row in result["rows"]:
                assert row["chosen"] == row["nats"].index(min(row["nats"]))
    classes = by_model(data, "licence-classes")["tiny"]["summary"]
    assert classes["chance"] == pytest.approx(1 / 3)
    assert 0 <= classes["macro_f1"]["low"] <= classes["macro_f1"]["high"] <= 1
    assert "macro_f1" not in by_model(data, "licence-choice")["tiny"]["summary"]
    words = (compared / "eval.md").read_text(encoding="utf-8")
    assert "n = 12, chance 0.333" in words
    assert "licence-generation (n = 12, chance 0.000)" in words
    assert not list(compared.glob(".reference*"))


def test_a_run_that_lost_a_set_goes_on_with_that_set(
    compared: Path, tiny: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = (tiny, "--choice", rows["choice"], "--text", rows["text"], "--window-tokens", 32)
    whole = evaluated(tmp_path / "out", *words)
    stamps = {
        file.parent.name: file.stat().st_mtime_ns
        for file in tmp_path.rglob(f"scores/*/*/{MANIFEST}")
    }
    shutil.rmtree(tmp_path / "out" / "scores" / "tiny" / "licence-text")
    again = evaluated(tmp_path / "out", *words)
    now = {
        file.parent.name: file.stat().st_mtime_ns
        for file in tmp_path.rglob(f"scores/*/*/{MANIFEST}")
    }
    assert now["licence-choice"] == stamps["licence-choice"]
    assert now["licence-text"] != stamps["licence-text"]
    for one, other in zip(whole["results"], again["results"], strict=True):
        assert one["rows"] == other["rows"]
        assert one["summary"] == other["summary"]


def test_a_killed_evaluation_goes_on_to_the_same_result(
    tiny: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = [str(tiny), "--choice", str(rows["choice"]), "--text", str(rows["text"])]
    words += ["--window-tokens", "16", "--limit", "400", "--threads", "1"]
    command = [sys.executable, "-m", "shortstack", "eval", *words, "-o", str(tmp_path / "killed")]
    first = tmp_path / "killed" / "scores" / "tiny" / "licence-choice" / MANIFEST
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not first.is_file():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.kill()
    assert first.is_file()
    stamp = first.stat().st_mtime_ns
    again = evaluated(tmp_path / "killed", *words)
    whole = evaluated(tmp_path / "whole", *words)
    assert first.stat().st_mtime_ns == stamp
    for one, other in zip(again["results"], whole["results"], strict=True):
        assert one["rows"] == other["rows"]


def test_a_set_file_names_sets_beside_it(tiny: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(rows["classes"], tmp_path / "mine.jsonl")
    file = tmp_path / "sets.yaml"
    file.write_text(
        "sets:\n- {name: mood, kind: choice, path: mine.jsonl, limit: 6, metric: macro_f1}\n"
    )
    data = evaluated(tmp_path / "out", tiny, "--sets", file)
    assert [(spec["name"], spec["metric"]) for spec in data["sets"]] == [("mood", "macro_f1")]
    assert data["results"][0]["summary"]["n"] == 6


def test_a_limit_draws_the_same_rows_with_the_same_seed() -> None:
    numbers = list(range(100))
    assert subset(numbers, 10, 1) == subset(numbers, 10, 1) != subset(numbers, 10, 2)
    assert subset(numbers, 10, 1) == tuple(sorted(subset(numbers, 10, 1)))
    assert subset(numbers, None, 1) == subset(numbers, 1000, 1) == tuple(numbers)


def test_one_row_is_enough(tiny: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    data = evaluated(tmp_path / "out", tiny, "--choice", rows["choice"], "--limit", 1)
    assert data["results"][0]["summary"]["n"] == 1


def bad(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that is refused."""
    assert main(["eval", *map(str, words)]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("shortstack: ")
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    ("option", "row", "words"),
    [
        ("--choice", {"text": "a"}, "no string field 'question'"),
        ("--choice", {"question": "a", "choices": ["b"], "answer": 0}, "two or more"),
        ("--text", {"question": "a"}, "no string field 'text'"),
        ("--generate", {"question": "a", "choices": ["b", "c"]}, "Rename the columns"),
        ("--generate", {"text": "one two", "target": "one"}, "does not end in 'target'"),
    ],
)
def test_wrong_columns_are_refused(
    option: str,
    row: dict[str, Any],
    words: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_rows(tmp_path / "bad.jsonl", [row])
    told = bad(capsys, tiny, option, file, "-o", tmp_path / "out")
    assert words in told
    assert "bad.jsonl, line 1" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--choice", "--text", "--generate"])
def test_an_empty_file_is_refused(
    option: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl holds no" in bad(capsys, tiny, option, file, "-o", tmp_path / "out")


def test_what_is_no_model_or_no_set_is_refused(
    tiny: Path,
    rows: dict[str, Path],
    exports: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("-o", tmp_path / "out")
    choice = ("--choice", rows["choice"])
    assert "nothing to evaluate on" in bad(capsys, tiny, *out)
    assert "is no model" in bad(capsys, rows["choice"], *choice, *out)
    assert "does not open" in bad(capsys, tiny, *choice, *out, "--runtime", "llama.cpp")
    for option, wrong in (("--device", "tpu"), ("--device", "cuda:99"), ("--dtype", "int4")):
        told = bad(capsys, tiny, *choice, *out, option, wrong)
        assert wrong in told or "no GPU here" in told
    assert not (tmp_path / "out").exists()
    assert "unknown runtime" in bad(capsys, tiny, *choice, *out, "--runtime", "lama.cpp")
    assert "no file" in bad(capsys, tiny, "--choice", tmp_path / "none.jsonl", *out)
    assert "two sets are named" in bad(capsys, tiny, *choice, *choice, *out)
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "was not made by shortstack" in bad(capsys, tiny, *choice, "-o", tmp_path / "mine")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: a, kind: choise, path: x.jsonl}", "Did you mean 'choice'?"),
        ("{name: a, kind: choice, path: x.jsonl, limits: 3}", "Did you mean 'limit'?"),
        ("{name: a, kind: choice, path: x.jsonl, limit: -3}", "limit must be a whole number"),
        ("{name: a, kind: choice, path: x.jsonl, metric: f1}", "unknown metric"),
        ("{name: a, kind: choice}", "no text 'path'"),
        ("[]", "give `sets:`"),
        ("{", "is not YAML"),
    ],
)
def test_a_set_file_with_a_mistake_is_refused(
    entry: str, words: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "x.jsonl", [{"question": "a", "choices": ["b", "c"], "answer": 0}])
    (tmp_path / "sets.yaml").write_text(f"sets:\n- {entry}\n")
    out = tmp_path / "out"
    assert words in bad(capsys, tiny, "--sets", tmp_path / "sets.yaml", "-o", out)


def test_a_folder_named_as_an_exit_is_not_scored_in_its_place(
    tiny: Path, rows: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_exits(tiny, tmp_path / "ex")
    shutil.copytree(tiny, tmp_path / "ex@4")
    out = tmp_path / "out"
    told = bad(capsys, tmp_path / "ex@4", "--text", rows["text"], "-o", out)
    assert "also a name of depth 4 of the exits in" in told
    assert not out.exists()
    (tmp_path / "ex@4").rename(tmp_path / "ex@3")  # there is no such exit to hide
    words = ("--text", rows["text"], "--limit", 1, "--window-tokens", 32)
    data = evaluated(out, tmp_path / "ex@3", tmp_path / "ex@4", *words)
    assert [(model["path"], model["n_layers"]) for model in data["models"]] == [
        ("ex@3", 6),
        ("model", 5),
    ]


def test_a_model_that_is_scored_once_under_two_names_is_told(
    tiny: Path, rows: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two[b]"
    for folder in (one, two):
        shutil.copytree(tiny, folder)
    words = ["--text", str(rows["text"]), "--limit", "1", "--window-tokens", "32"]
    words += ["--threads", "1", "-o", str(tmp_path / "out")]
    assert main(["eval", str(one), str(two), str(one), *words]) == 0
    told = capsys.readouterr()
    lines = [line.strip() for line in told.err.splitlines() if "scored once" in line]
    assert lines == [
        f"{two} holds the same weights as {one}: scored once",
        f"{one} is named twice: scored once",
    ]
    assert "scored once" not in told.out
    data = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert [model["label"] for model in data["models"]] == ["one"]


def test_prompts_come_in_three_spellings(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"text": "one two three", "target": "three"},
            {"context": "one two", "target": "three"},
            {"question": "How many?", "answer_text": "3", "context": "Three cats."},
        ],
    )
    found = open_prompts(file)
    assert [row.prompt for row in found] == [
        "one two",
        "one two",
        "Three cats.\nQuestion: How many?\nAnswer:",
    ]
    assert [row.word for row in found] == [True, True, False]
