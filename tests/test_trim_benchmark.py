"""The benchmark of trims: every mode runs, spends the same rows, and a missing set is no error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks.trim import main
from tests.test_trim_command import write
from tests.trimming import made_up

FAST = ["rate=0.001", "rows_per_epoch=24", "batch_rows=8", "max_prompt_tokens=48"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One set, and one of the two off-domain sets: a machine may hold a part of the data."""
    rows = made_up(200)
    parts = {"train": rows[:80], "validation": rows[80:184], "test": rows[184:]}
    for name, questions in (("red/blue", parts), ("general/piqa", {"test": made_up(9, seed=5)})):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part, chosen in questions.items():
            write(tmp_path / "data" / name / f"{part}.jsonl", chosen)
    return tmp_path / "data"


def test_all_modes_run_and_spend_the_same_rows(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(tiny), "--data", str(data), "--sets", "red/blue", "--seeds", "0", "--threads"]
    command += ["1", "--keep", "0.5", "--set", *FAST, "snapshots=[0.75]", "--out", str(out)]
    assert main(command) == 0, [log.read_text() for log in out.glob("*.log")]
    runs = {
        mode: json.loads((out / f"trim.red_blue.{mode}.0.json").read_text())
        for mode in ("full", "progressive", "one-shot")
    }
    for run in runs.values():
        assert run["curve"][-1]["tokens"] == runs["progressive"]["curve"][-1]["tokens"]
        assert len(run["curve"]) == len(runs["progressive"]["curve"])
        assert all(set(scores) == {"test", "general/piqa"} for scores in run["tests"].values())
    assert len(runs["full"]["trained"]) == 12
    assert len(runs["progressive"]["trained"]) == 3
    assert set(runs["full"]["dense"]) == {"test", "general/piqa"}
    printed = capsys.readouterr().out
    for row in ("untuned | 100%", "full | 100%", "progressive | 75%", "one-shot | 50%"):
        assert f"| {row} |" in printed
    for mode in runs:
        line = rf"trim, {mode}, cpu, 1 at once: [\d.]+ s a round, 5 rounds, \d+ s to load and test"
        assert re.search(line, printed)
