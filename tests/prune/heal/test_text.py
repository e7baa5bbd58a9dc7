"""What healing reads: packed text at a share, no leak; the teacher's cache; its own text."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.healing import LENGTH, Windows, settings

from shortstack import cli
from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.commands.heal import HealText, windows_for
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.pretrained import load
from shortstack.prune.heal.data import mix, packed_windows, read_documents
from shortstack.prune.heal.order import rows_of_step
from shortstack.prune.heal.sample import kept_windows, sampled_windows
from shortstack.prune.heal.train import heal


def rows(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def test_long_documents_are_cut_and_short_ones_joined() -> None:
    windows = packed_windows(["aaaaaaa", "bb", "cc"], lambda text: list(map(ord, text)), 3)
    assert ["".join(map(chr, window)) for window in windows] == [
        "aaa",
        "aaa",
        "a\n\n",
        "bb\n",
        "\ncc",
    ]


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 200), (0.25, 40), (0.9, 1000)])
def test_the_share_of_general_text_is_kept(share: float, wanted: int) -> None:
    own, general = [[1, at] for at in range(10)], [[2, at] for at in range(90)]
    mixed = mix(own, general, share, wanted)
    counts = Counter(kind for kind, _ in mixed)
    assert len(mixed) <= wanted
    assert counts[2] / len(mixed) == pytest.approx(share, abs=0.02)
    if len(mixed) < wanted:  # one pass: all of both texts is in it
        assert {tuple(w) for w in mixed} == {tuple(w) for w in [*own, *general]}


def test_a_folder_of_splits(tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", ["learn this", "and this"])
    rows(tmp_path / "validation.jsonl", ["choose on this"])
    rows(tmp_path / "test.jsonl", ["report on this"])
    found = read_documents([str(tmp_path)])
    assert found.train == ("learn this", "and this")
    assert found.selection == ("choose on this",)


def test_a_small_budget_draws_from_all_of_the_text(tmp_path: Path, cut: Checkpoint) -> None:
    rows(tmp_path / "train.jsonl", [f"{at} " * 99 for at in range(30)])
    rows(tmp_path / "validation.jsonl", ["chosen " + "word " * 99])
    rows(tmp_path / "test.jsonl", ["reported " + "word " * 99])
    text, small = HealText((str(tmp_path),)), settings(tokens=2 * LENGTH, batch_windows=2)
    everything, _ = windows_for(cut, text, settings(tokens=10**6))
    found = [windows_for(cut, text, replace(small, seed=seed))[0] for seed in range(4)]
    assert all(len(few) == 2 and all(w in everything for w in few) for few in found)
    assert len({tuple(map(tuple, few)) for few in found}) == 4
    assert windows_for(cut, text, small)[0] == found[small.seed]


def test_leaks_are_refused(tmp_path: Path, cut: Checkpoint) -> None:
    own, general = tmp_path / "own", tmp_path / "general"
    for folder in (own, general):
        folder.mkdir()
        rows(folder / "train.jsonl", [f"{folder.name} {at} " + "text " * 99 for at in range(9)])
        rows(folder / "validation.jsonl", [f"{folder.name} chosen " + "word " * 99])
        rows(folder / "test.jsonl", [f"{folder.name} reported " + "word " * 99])
    text = HealText((str(own),), (str(general),), selection_windows=2)
    train, selection = windows_for(cut, text, settings())
    assert not {tuple(w) for w in train} & {tuple(w) for w in selection}
    for leaked in ("chosen", "reported"):
        rows(general / "train.jsonl", [f"own {leaked} " + "word " * 99])
        with pytest.raises(ShortstackError, match="share 1 documents"):
            windows_for(cut, text, settings())
    rows(general / "train.jsonl", ["general again " + "text " * 99])
    rows(general / "validation.jsonl", ["own reported " + "word " * 99])
    with pytest.raises(ShortstackError, match="share 1 documents"):
        windows_for(cut, text, settings())
    rows(own / "train.jsonl", ["own chosen " + "word " * 99])
    with pytest.raises(ShortstackError, match="share 1 documents"):
        windows_for(cut, HealText((str(own),)), settings())


def test_too_little_text(tmp_path: Path, cut: Checkpoint) -> None:
    rows(tmp_path / "train.jsonl", ["short"])
    rows(tmp_path / "validation.jsonl", ["also short"])
    rows(tmp_path / "test.jsonl", ["and this"])
    with pytest.raises(ShortstackError, match="training text holds no 64 tokens"):
        windows_for(cut, HealText((str(tmp_path),)), settings())
    with pytest.raises(ShortstackError, match="no train"):
        read_documents([str(tmp_path / "..")])


def test_a_cache_gives_what_the_teacher_gives(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    chosen = settings(top_k=32, temperature=2.0)
    results = []
    for name, cache in (("live", None), ("cached", tmp_path / "c"), ("again", tmp_path / "c")):
        (tmp_path / name).mkdir()
        results.append(heal(cut, original, *windows, tmp_path / name, chosen, cache=cache)[1])
    live, cached, again = ([e.get("loss", 0) for e in facts["history"]] for facts in results)
    assert cached == pytest.approx(live, rel=2e-3)  # float16
    assert again == cached
    assert live[-1] < live[1]
    kinds = {p.suffix for p in (tmp_path / "c").iterdir()}
    assert kinds == {".json", ".safetensors"}
    with pytest.raises(ShortstackError, match="--top-k"):
        heal(cut, original, *windows, tmp_path, settings(), cache=tmp_path / "d")
    with pytest.raises(ShortstackError, match="no cache of ours"):
        heal(cut, original, *windows, tmp_path, chosen, cache=tmp_path / "live")


def test_every_seed_has_an_order_of_its_own_and_reads_all() -> None:
    def passes(seed: int) -> tuple[tuple[int, ...], ...]:
        rows = [row for step in range(8) for row in rows_of_step(step, 4, 16, seed)]
        return tuple(rows[:16]), tuple(rows[16:])

    orders = [order for seed in (0, 1, 2, -1, 1 << 32) for order in passes(seed)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert passes(1) == passes(1)


def test_text_from_the_teacher(original: Checkpoint) -> None:
    starts = [[1, 5, 9], [1, 7, 3]]
    made = sampled_windows(original, starts, LENGTH, 5, batch=4, device="cpu")
    assert [window[:3] for window in made] == [starts[at % 2] for at in range(5)]
    assert {len(window) for window in made} == {LENGTH}
    assert made[:4] == sampled_windows(original, starts, LENGTH, 4, batch=4, device="cpu")
    assert made[0] != made[2]
    other = sampled_windows(original, starts, LENGTH, 4, batch=4, device="cpu", seed=1)
    assert all(mine != theirs for mine, theirs in zip(made, other, strict=False))
    tokens = torch.tensor(made)
    with torch.no_grad():
        loss = load(original.path, torch.float32)(tokens, labels=tokens).loss.item()
    assert loss < 4.5  # guessing among 512 tokens costs 6.2 nats


def test_the_command_lets_the_teacher_write(
    cut: Checkpoint, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "healed"
    command = [
        *("heal", str(cut.path), "--teacher", str(tiny), "--text", "spdx", "-o", str(out)),
        *("--tokens", str(8 * LENGTH), "--window-tokens", str(LENGTH), "--batch-windows", "4"),
        *("--selection-windows", "4", "--device", "cpu", "--self-generated-tokens", "300"),
        *("--top-k", "16", "--cache", str(tmp_path / "cache"), "--json"),
    ]
    assert cli.main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["perplexity_after"] < facts["perplexity_before"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "healed"]
    missing = [*command[:-1], "--teacher", str(tmp_path / "nowhere")]
    assert cli.main(missing) == 2
    assert "no file or folder" in capsys.readouterr().err
    assert cli.main(command) == 0  # done already
    assert json.loads(capsys.readouterr().out) == facts


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rate", "-1", "--rate is -1.0; it must be a number above 0."),
        ("--final-rate", "2", "--final-rate is 2.0; it must lie in 0 to 1."),
    ],
)
def test_a_refused_setting_is_called_as_it_was_typed(
    option: str,
    value: str,
    said: str,
    cut: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--text", "spdx", "--tokens", "64", option, value, "-o", str(tmp_path / "out")]
    assert cli.main(["heal", str(cut.path), *words]) == 2
    assert capsys.readouterr().err == f"shortstack: {said}\n"


def test_samples_are_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    file, calls = tmp_path / "samples", []

    def make() -> list[list[int]]:
        calls.append(1)
        return [[1, 2], [3, 4]]

    assert kept_windows(file, "a", make, first=True) == [[1, 2], [3, 4]]
    assert kept_windows(file, "a", make, first=False) == [[1, 2], [3, 4]]
    assert len(calls) == 1
    kept_windows(file, "b", make, first=True)
    assert len(calls) == 2


def test_the_teacher_may_be_a_gguf_file(
    cut: Checkpoint, original: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it teaches is what the folder teaches; nothing of its unpacking stays."""
    made = exporter("gguf").export(original, ExportSpec.parse("gguf:F32"), tmp_path)
    common = ["--text", "spdx", "--tokens", str(16 * LENGTH), "--window-tokens", str(LENGTH)]
    common += ["--batch-windows", "4", "--selection-windows", "4", "--device", "cpu", "--json"]
    found = []
    for name, teacher in (("a", original.path), ("b", made.path)):
        command = ["heal", str(cut.path), "--teacher", str(teacher), *common]
        assert cli.main([*command, "-o", str(tmp_path / name)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["perplexity_after"] == pytest.approx(found[0]["perplexity_after"], rel=1e-4)
    assert found[1]["perplexity_after"] < found[1]["perplexity_before"]
    assert not [path.name for path in tmp_path.iterdir() if "model.partial" in path.name]
