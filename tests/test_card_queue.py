"""`benchmarks/card_queue.sh`: cards share a list, and none waits for what will not come."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

QUEUE = Path(__file__).parents[1] / "benchmarks" / "card_queue.sh"


def queue(out: Path, items: str, python: str) -> str:
    """What it prints, with a shell script in the place of python3."""
    stand_in = out / "bin" / "python3"
    stand_in.parent.mkdir(parents=True, exist_ok=True)
    stand_in.write_text(f"#!/bin/sh\n{python}\n")
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    words = ["model", "data", "models", "gguf", str(out), "llama-bench"]
    done = subprocess.run(
        ["bash", str(QUEUE), *words],
        env={"PATH": path, "ITEMS": items},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("items", ["balcony cut-15", "sample balcony cut-15"])
def test_what_needs_sampled_text_fails_where_there_is_none(tmp_path: Path, items: str) -> None:
    told = queue(tmp_path, items, "exit 3")
    assert "balcony: exit 1," in told
    assert "cut-15: exit 1," in told
    assert "run the item sample" in (tmp_path / "log-balcony.txt").read_text()


def test_what_needs_the_tuned_model_fails_where_there_is_none(tmp_path: Path) -> None:
    assert "early-cpu: exit 1," in queue(tmp_path, "early-cpu", "exit 3")
    assert "run the item early" in (tmp_path / "log-early-cpu.txt").read_text()
    told = queue(tmp_path / "failed", "early early-cpu", "exit 3")
    assert "early: exit 3," in told
    assert "early-cpu: exit 1," in told


def test_an_item_is_taken_once(tmp_path: Path) -> None:
    told = queue(tmp_path, "sample balcony", 'echo "$@"')
    assert [line.partition(", ")[0] for line in told.splitlines()] == [
        "card all sample: exit 0",
        "card all balcony: exit 0",
    ]
    log = (tmp_path / "log-balcony.txt").read_text()
    model = Path("model").absolute()
    assert f"train {model} --data data" in log
    assert f"eval {model} --data data" in log
    assert queue(tmp_path, "sample balcony", "exit 3") == ""
