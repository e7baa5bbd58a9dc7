"""Healing on a cut of the trained tiny model: better, and only where it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack import prune
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune.heal.data import packed_windows
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.heal.train import heal
from shortstack.prune.plan import PrunePlan
from shortstack.shards import ShardReader
from shortstack.text import open_corpus
from shortstack.tokens import Encoder

TINY = Path(__file__).parents[2] / "data" / "tiny"
LENGTH = 64
Windows = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(scope="module")
def original() -> Checkpoint:
    return Checkpoint.open(TINY)


@pytest.fixture(scope="module")
def cut(original: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    plan = PrunePlan(6, (3,), "explicit", attention=(1,))
    return prune.apply_plan(original, plan, tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def windows(original: Checkpoint) -> Windows:
    corpus, encoder = open_corpus("spdx"), Encoder(original)
    return (
        packed_windows(corpus.calibration[:40], encoder.encode, LENGTH),
        packed_windows(corpus.selection[:8], encoder.encode, LENGTH)[:16],
    )


def settings(**changed: Any) -> HealSettings:
    usual: dict[str, Any] = {"tokens": 10 * 8 * LENGTH, "window_tokens": LENGTH, "batch_windows": 8}
    return HealSettings(**{**usual, "device": "cpu", "learning_rate": 1e-3, **changed})


def read(checkpoint: Checkpoint) -> dict[str, bytes]:
    with ShardReader(checkpoint) as reader:
        return {name: b"".join(reader.chunks(name)) for name in checkpoint.tensors}


@pytest.mark.parametrize("loss", ["kl", "ce", "mix"])
def test_loss_falls_and_perplexity_improves(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path, loss: str
) -> None:
    before = read(original)
    healed, facts = heal(cut, original, *windows, tmp_path, settings(loss=loss))
    assert facts["perplexity_after"] < 0.9 * facts["perplexity_before"]
    assert facts["history"][-1]["loss"] < facts["history"][1]["loss"]
    assert read(original) == before
    assert healed.removed == cut.removed  # its projection is still zero
    name = "model.layers.1.self_attn.o_proj.weight"
    assert not np.frombuffer(read(healed)[name], np.uint8).any()


def test_only_the_neighbours_of_the_cut_learn(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    healed, _ = heal(cut, original, *windows, tmp_path, settings(train="neighbours"))
    before, after = read(cut), read(healed)
    changed = {cut.family.layer_of(name) for name in before if before[name] != after[name]}
    assert changed == {2, 3}


def test_kl_needs_a_teacher(cut: Checkpoint, windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="--teacher"):
        heal(cut, None, *windows, tmp_path, settings())
