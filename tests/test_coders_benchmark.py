"""The benchmark of coders prints a row a stream, of Gaussians and of a folder's codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks import coders
from tests.packed_models import write_coded


def test_every_stream_has_a_row_with_bits_near_its_entropy(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = write_coded(tiny, tmp_path / "coded")
    monkeypatch.setattr(sys, "argv", ["coders", str(coded.path), "--weights", "100000"])
    coders.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert {row[0] for row in rows} >= {
        "Gaussian BF16, exponents",
        "Gaussian codes, step 1 sigma",
        "coded, embedding codes",
        "coded, MLP codes",
    }
    for name, entropy, *tried, taken in rows:
        best = min(float(cell.partition(";")[0]) for cell in tried)
        assert best > float(entropy) - 0.5, name
        assert taken in ("none", "zstd", "ans")
    assert next(row[-1] for row in rows if row[0] == "Gaussian codes, step 2 sigma") == "ans"


def test_packing_a_shape_tells_its_peak(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["coders", "--shape", "tiny", "--layers", "1", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    coders.main()
    assert "tiny, 1 layers" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_a_card_nvcomp_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", None)
    with pytest.raises(SystemExit, match="--nvcomp: "):
        coders.on_card([])
