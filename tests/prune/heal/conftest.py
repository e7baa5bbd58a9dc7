"""A cut of the trained tiny model, and windows to heal it on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.healing import LENGTH, Windows

from shortstack import prune
from shortstack.checkpoint import Checkpoint
from shortstack.prune.heal.data import packed_windows
from shortstack.prune.plan import PrunePlan
from shortstack.text import open_corpus
from shortstack.tokens import Encoder


@pytest.fixture(scope="session")
def original(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.fixture(scope="session")
def cut(original: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Layer 3 gone, and the attention of layer 1."""
    plan = PrunePlan(6, (3,), "explicit", attention=(1,))
    return prune.apply_plan(original, plan, tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="session")
def windows(original: Checkpoint) -> Windows:
    corpus, encoder = open_corpus("spdx"), Encoder(original)
    return (
        packed_windows(corpus.calibration[:40], encoder.encode, LENGTH),
        packed_windows(corpus.selection[:8], encoder.encode, LENGTH)[:16],
    )
