"""The benchmark of exports runs from one command, without a model of one's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "export_memory.py"


def test_the_benchmark_prints_a_row_an_export_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:] == ["cp, durable", "gguf:F16, ours", "gguf:Q4_0, ours"]
    assert "SKIPPED: llama.cpp's converter" in done.stdout
    assert list(tmp_path.iterdir()) == []
