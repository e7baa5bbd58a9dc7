"""The benchmark of depth samples text as healing does, and finds it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks import depth, streamline
from benchmarks.depth import BEGINNING, CHOICES, GENERAL, LENGTH, main, windows
from safetensors.numpy import load_file

from shortstack.checkpoint import Checkpoint
from shortstack.prune.heal.sample import sampled_windows


def write(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def test_two_processes_share_the_sampling(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    texts = [f"Article {at}: " + "the licence of this work permits " * 20 for at in range(4)]
    write(data / "general/wikitext2/validation.jsonl", texts)
    for at, name in enumerate(GENERAL):
        write(data / name / "train.jsonl", [f"Other {at}: " + "you may copy the software " * 20])
    out.mkdir()
    (out / "model").symlink_to(tiny)
    words = ["depth", str(tiny), "--data", str(data), "--out", str(out)]
    for number in ("0", "1"):
        task = ["--sampled", str(5 * LENGTH), "--task", "sample", number, "2"]
        monkeypatch.setattr(sys, "argv", [*words, *task])
        main()
    made = [load_file(out / f"sampled-{at}.safetensors")["tokens"] for at in (0, 1)]
    assert [tokens.shape for tokens in made] == [(3, LENGTH), (2, LENGTH)]
    original = Checkpoint.open(tiny)
    known = [tuple(row) for text in texts for row in windows(original, [text], BEGINNING)]
    starts = {tuple(row[:BEGINNING].tolist()) for tokens in made for row in tokens}
    assert starts & set(known)
    assert len(starts) == 5  # no window begins like another
    # the share of a process is what the teacher of healing would write with that seed
    for seed, tokens in enumerate(made):
        mine = tokens[:, :BEGINNING].tolist()
        again = sampled_windows(original, mine, LENGTH, len(mine), seed=seed, device="cpu")
        assert tokens.tolist() == again


def test_streamline_opens_a_model_that_is_a_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows are there already: what is left is to open the model and print the table."""
    out = tmp_path / "out"
    out.mkdir()
    figures = dict.fromkeys(("selection", "test", "unseen", *CHOICES), {"estimate": 1.0})
    row = json.dumps({"training": {}, "scores": figures})
    (out / "streamline-full-8.json").write_text(row, encoding="utf-8")
    words = ["streamline", str(tiny), "--data", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--kinds", "full"])
    streamline.main()
    assert "| full | 1.0 |" in capsys.readouterr().out
    assert Checkpoint.open(out / "model").sha256 == Checkpoint.open(tiny).sha256


@pytest.mark.parametrize(
    ("seen", "device", "expected"),
    [
        (None, "cuda:1", "1"),
        ("3", "cuda:0", "3"),
        ("2,5", "cuda:1", "5"),
        ("3", "cpu", ""),
        ("", "cuda:0", ""),
    ],
)
def test_children_count_cards_in_what_the_parent_sees(
    monkeypatch: pytest.MonkeyPatch, seen: str | None, device: str, expected: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert depth.card_of(device) == expected
