"""`shortstack repair`: from a cut folder to a repaired one; what a user gets wrong in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shortstack.cli import main
from shortstack.manifest import read_manifest

TEXT = str(Path(__file__).parents[1] / "LICENSE")
FEW = ["--windows", "16", "--window-tokens", "32", "-q"]


@pytest.fixture(scope="module")
def cut(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair") / "cut"
    assert main(["prune", str(tiny), "--drop", "2-3", "-o", str(folder), "-q"]) == 0
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The licence, a row a paragraph group, so that every part has some."""
    text = Path(TEXT).read_text(encoding="utf-8")
    rows = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def test_a_cut_is_repaired_and_then_found_done(
    cut: Path, tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["repair", str(cut), "--of", str(tiny), "--text", str(corpus), "-o", str(out), *FEW]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    reached = answer["facts"]["selection_perplexity"]
    assert reached["repaired"] < reached["pruned"]
    assert answer["layers"] == 4 + len(answer["slot_layers"])
    before = read_manifest(out)
    assert main(command) == 0
    assert read_manifest(out) == before


def test_what_a_user_gets_wrong_is_one_line(
    cut: Path, tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    unplanned = tmp_path / "unplanned"
    shutil.copytree(cut, unplanned)
    (unplanned / "plan.json").unlink()
    pruned, of, text = str(cut), str(tiny), str(corpus)
    wrong = {
        "no plan.json that can be read": [str(unplanned), "--of", of, "--text", text],
        "was not made of": [pruned, "--of", pruned, "--text", text],
        "unknown repair 'gost'": [pruned, "--of", of, "--text", text, "--method", "gost"],
        "too few documents": [pruned, "--of", of, "--text", str(short)],
        "cannot determine a map of 64": [
            *(pruned, "--of", of, "--text", text),
            *("--windows", "4", "--window-tokens", "8"),
        ],
        "is not a Hugging Face model folder": [
            str(short.parent / "none"),
            "--of",
            of,
            "--text",
            text,
        ],
        "overlap": [pruned, "--of", of, "--text", text, "-o", str(cut / "inside")],
    }
    for said, args in wrong.items():
        out = [] if "-o" in args else ["-o", str(tmp_path / "out")]
        assert main(["repair", *args, *out, "-q"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0]
        assert not (tmp_path / "out").exists()


def test_the_wrong_original_is_refused_before_it_is_opened(
    cut: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["repair", str(cut), "--of", str(cut), "--text", str(corpus)]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2  # not quiet: no bar either
    said = capsys.readouterr().err
    assert f"was not made of {cut}: sizes" in said
    assert said.count("\n") == 1


def test_an_original_of_another_seed_is_refused_before_it_runs(
    cut: Path, tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    data = load_file(other / "model.safetensors")
    name = "model.embed_tokens.weight"
    data[name] = data[name].flip(0)
    save_file(data, other / "model.safetensors", {"format": "pt"})
    command = ["repair", str(cut), "--of", str(other), "--text", str(corpus)]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"was not made of {other}: sizes" in said
    assert "Repair the cut" not in said
