"""`shortstack quantize`: a folder with its sidecar, found done again; mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortstack.checkpoint import SIDECAR
from shortstack.cli import main
from shortstack.manifest import read_manifest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    rows = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def test_a_model_is_quantized_measured_and_then_found_done(
    tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = ["--windows", "8", "--window-tokens", "64"]
    command = ["quantize", str(tiny), "--bits", "5", "--text", str(corpus), "-o", str(out), *few]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bits_per_weight"] == pytest.approx(5.0, abs=0.06)
    assert (out / SIDECAR).is_file()
    before = read_manifest(out)
    assert main(command) == 0
    assert read_manifest(out) == before
    table = capsys.readouterr().out
    assert "whole file" in table
    assert "mlp.down_proj" in table
    args = [str(out), "--against", str(tiny), "--text", str(corpus), "--window-tokens", "64"]
    assert main(["eval", *args, "--limit", "2", "-o", str(tmp_path / "eval"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    ratios = [r["against"]["ratio"]["estimate"] for r in results if "against" in r]
    assert len(ratios) == 1
    assert 0.9 < ratios[0] < 1.1


def test_codes_learn_from_text_and_from_what_the_model_writes(
    tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "out"
    few = ["--windows", "4", "--window-tokens", "32", "--device", "cpu"]
    learning = ["--learn-tokens", "256", "--batch-tokens", "128", "--self-generated-tokens", "64"]
    command = ["quantize", str(tiny), "--bits", "5", "--text", str(corpus), "-o", str(out)]
    assert main([*command, *few, *learning, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bits_per_weight"] == pytest.approx(5.0, abs=0.02)
    assert answer["learning"]["steps"] == 2
    assert [place.name for place in out.parent.iterdir()] == ["out"], "samples and states are gone"


def test_what_a_user_gets_wrong_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "unknown method of quantizing 'plane'. Did you mean 'plain'?": ["--method", "plane"],
        "--bits must be above 0 and at most 8, got 9": ["--bits", "9"],
        "--rate-weight must be from 0 to 4": ["--rate-weight", "5"],
        "--learning-rate must be above 0 and at most 0.5, got 1": ["--learning-rate", "1"],
        "self_generated_tokens is for learning codes": ["--self-generated-tokens", "5"],
        "device 'cuda:77' cannot be used": ["--device", "cuda:77"],
        "Choose other --bits": ["--bits", "0.1", "--method", "plain"],
        "none.txt": ["--text", str(tmp_path / "none.txt")],
        "overlap": ["-o", str(tiny / "inside")],
    }
    for said, args in wrong.items():
        out = [] if "-o" in args else ["-o", str(tmp_path / "out")]
        assert main(["quantize", str(tiny), *args, *out, "-q"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0]
        assert not (tmp_path / "out").exists()
