"""Where a trim stops, and what it is refused for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trimming import QUICK, made_up, parts, run
from tests.zoo import make_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.trim.ahead import check_reachable
from shortstack.prune.trim.model import TrimModel, Unit, parse_unit
from shortstack.prune.trim.rows import Parts, split_scan
from shortstack.prune.trim.schedule import Schedule, droppable
from shortstack.prune.trim.settings import Settings, Target
from shortstack.tokens import Encoder


def test_bad_targets_and_settings_are_refused(opened: tuple[Any, Encoder]) -> None:
    model = TrimModel(opened[0], "sub-block")
    with pytest.raises(ShortstackError, match="cannot drop 12 of 12 units: 11 may go"):
        Schedule.make(model, QUICK, Target(keep=0.01))
    protected = dataclasses.replace(QUICK, protect_first=1, protect_last=1)
    with pytest.raises(ShortstackError, match="8 may go"):
        Schedule.make(model, protected, Target(keep=0.1))
    with pytest.raises(ShortstackError, match="needs one target"):
        Target()
    with pytest.raises(ShortstackError, match="full fine-tune"):
        Target(loss_points=1.0)
    with pytest.raises(ShortstackError, match="unknown score"):
        Settings(score="scna")


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma2"])
@pytest.mark.parametrize("unit", ["sub-block", "block"])
def test_what_cannot_be_met_is_told_from_the_headers(name: str, unit: str, tmp_path: Path) -> None:
    """To the byte where the loop says it of the loaded model."""
    folder = make_model(name, tmp_path / "model")
    checkpoint, settings = Checkpoint.open(folder), dataclasses.replace(QUICK, unit=unit)
    model = TrimModel(load(folder, torch.float32), unit)
    free = droppable(model, settings)
    stays = sum(4 * p.numel() for p in model.hf.parameters())
    stays -= sum(4 * p.numel() for u in free for p in model.parameters_of(u).values())
    Schedule.make(model, settings, Target(max_bytes=stays))
    check_reachable(checkpoint, settings, Target(max_bytes=stays))
    for target in (Target(max_bytes=stays - 1), Target(keep=0.01)):
        with pytest.raises(ShortstackError) as late:
            Schedule.make(model, settings, target)
        with pytest.raises(ShortstackError) as early:
            check_reachable(checkpoint, settings, target)
        assert str(early.value) == str(late.value)


def test_parts_are_disjoint_and_large_enough() -> None:
    rows = made_up(40)
    with pytest.raises(ShortstackError, match="tune and test rows share 1"):
        Parts(tuple(rows[:20]), tuple(rows[20:30]), (rows[3],))
    with pytest.raises(ShortstackError, match="there are 1 scan rows"):
        Parts(tuple(rows[:20]), (rows[30],))
    with pytest.raises(ShortstackError, match="9 tune rows; 8 different"):
        Parts((rows[0],) * 9, tuple(rows[20:30]))
    tune, scanned = split_scan([*rows, rows[0]], seed=3)
    assert len(scanned) in (8, 9)
    assert len(tune) + len(scanned) == 41
    Parts(tune, scanned)


def test_targets_in_bytes_time_and_points(
    opened: tuple[Any, Encoder], tiny: Path, tmp_path: Path
) -> None:
    model = TrimModel(opened[0], "sub-block")
    whole = sum(p.numel() * 4 for p in model.hf.parameters())
    units = sum(p.numel() * 4 for u in model.all_units for p in model.parameters_of(u).values())
    limit = whole - units // 2
    for mode in ("progressive", "one-shot"):
        settings = dataclasses.replace(QUICK, mode=mode, drop_per_step=2)
        small = run(tiny, tmp_path / mode, settings, target=Target(max_bytes=limit))
        gone = [p for u in small.last.gone for p in model.parameters_of(u).values()]
        if mode == "progressive":  # no more than it takes
            last = parse_unit(small.curve[-2]["dropped"][-1])
            spared = sum(p.numel() * 4 for p in model.parameters_of(last).values())
            assert whole - sum(p.numel() * 4 for p in gone) + spared > limit
            assert len(small.kept) == 1
        assert whole - sum(p.numel() * 4 for p in gone) <= limit
    with pytest.raises(ShortstackError, match="not met when all goes"):
        Schedule.make(model, QUICK, Target(max_bytes=whole - units))
    costs = {unit: 3.0 if unit.kind == "mlp" else 1.0 for unit in model.all_units}
    timed = Schedule.make(model, QUICK, Target(max_latency_ratio=0.5), costs)
    assert (timed.budget, timed.n_expected) == (12.0, 6)
    assert timed.met([unit for unit in model.all_units if unit.kind == "attention"])
    assert not timed.met([unit for unit in model.all_units if unit.kind == "mlp"])
    assert all(cost > 0 for cost in Schedule.make(model, QUICK, timed.target).costs.values())
    target = Target(loss_points=5.0, full_accuracy=0.9)
    lax = dataclasses.replace(QUICK, snapshots=(0.75,), batch_rows=4)
    passed = run(tiny, tmp_path, lax, target=target, parts=parts(96))
    left = [row["left"] for row in passed.curve if row["accuracy"] >= 0.85]
    assert passed.last.n_left == min(left)
    assert passed.last.accuracy >= 0.85
    assert passed.curve[-1]["left"] == 1 or passed.curve[-1]["accuracy"] < 0.85
    assert len(passed.kept) <= 2
    assert len(list(tmp_path.glob("kept-*"))) == len(passed.kept)


def test_units_read_what_they_write() -> None:
    for unit in (Unit(3, "mlp"), Unit(0, "attention"), Unit(12, "block")):
        assert parse_unit(str(unit)) == unit
