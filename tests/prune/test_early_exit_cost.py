"""What checks cost decides which are made: by hand, against all that there is, and measured."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.early_exits import ANSWERS, opened, prompts_of
from tests.prune.test_early_exit import traced

from shortstack.commands.early_exit_cost import LEAST_TURNS, check_cost
from shortstack.early_exit.cost import CheckCost
from shortstack.errors import ShortstackError
from shortstack.prune.early_exit.calibrate import (
    Limits,
    Outcome,
    Traced,
    calibrated,
    candidates,
    depth_rule,
    outcome,
)
from shortstack.prune.early_exit.choose import _without_each, choose, columns
from shortstack.prune.early_exit.fit import Settings, fit
from shortstack.prune.early_exit.states import States

NO_LOSS = Limits(0.0)


@pytest.mark.parametrize(
    ("cost", "kept", "layers", "made"),
    [(0.5, [0, 1], 2 + 4 + 8 + 8, 1 + 2 + 2 + 2), (1.0, [1], 4 + 4 + 8 + 8, 4)],
)
def test_dear_checks_are_not_made_though_more_layers_are_run(
    cost: float, kept: list[int], layers: int, made: int
) -> None:
    """Of the rows two may leave, one of them at the first check: without it two layers more are run
    and three checks less are made."""
    found, outcome_there = choose(traced(), NO_LOSS, cost)
    assert found == kept
    assert outcome_there.saved == pytest.approx(1 - layers / 32)
    assert outcome_there.checks == made / 4
    assert outcome_there.time_saved == pytest.approx(1 - (layers + cost * made) / 32)


def test_checks_that_cost_all_they_save_are_refused() -> None:
    with pytest.raises(ShortstackError, match="no threshold saves time where a check takes 8 of"):
        choose(traced(), Limits(1.0), 8.0)


def test_at_no_cost_the_choice_is_that_of_layers() -> None:
    kept, found = choose(traced(), NO_LOSS, 0.0)
    assert (kept, found) == ([0, 1], calibrated(traced(), NO_LOSS))
    assert found.time_saved == found.saved


def test_limits_that_cannot_hold_say_the_best() -> None:
    rows = traced()
    wrong = Traced(rows.scores, 1 - rows.chosen * 0, rows.full, rows.full, [2, 4], 8)
    with pytest.raises(ShortstackError, match=r"saves time and holds .* loses 0\.2500"):
        choose(wrong, Limits(0.1), 0.1)


def test_a_depth_makes_one_check() -> None:
    assert depth_rule(traced(), Limits(0.25), 0.5).time_saved == pytest.approx(1 - 4.5 / 8)


def drawn(seed: int, rows: int = 40, checks: int = 5) -> Traced:
    draw = np.random.default_rng(seed)
    full = draw.integers(0, 3, rows)
    agrees = draw.random((rows, checks)) < np.linspace(0.5, 0.95, checks)
    chosen = np.where(agrees, full[:, None], draw.integers(0, 3, (rows, checks)))
    scores = (agrees + draw.normal(0, 0.7, (rows, checks))).astype(np.float32)
    right = np.where(draw.random(rows) < 0.7, full, draw.integers(0, 3, rows))
    return Traced(scores, chosen, full, right, [2, 4, 6, 8, 10][:checks], 12)


@pytest.mark.parametrize("seed", range(4))
def test_sums_over_sets_of_checks_are_those_of_each(seed: int) -> None:
    rows, limits = drawn(seed), Limits(0.05, 0.1)
    for threshold in candidates(rows.scores)[::20]:
        for kept in ([0, 1, 2, 3, 4], [0, 2, 3], [1, 4]):
            beyond, saved = _without_each(rows, float(threshold), np.array(kept), limits, 0.3)
            sets = [kept, *(kept[:at] + kept[at + 1 :] for at in range(len(kept)))]
            for at, some in enumerate(sets):
                there = outcome(columns(rows, some), float(threshold), 0.3)
                assert saved[at] == pytest.approx(there.time_saved)
                over = limits.beyond(there.loss, there.changed)
                assert beyond[at] == pytest.approx(over, abs=1e-12)


def test_a_check_that_harms_takes_those_before_it_along() -> None:
    """The second of three is wrong for one row: sets with the third alone are tried, but not that
    of the first and the third, which these rows happen to like."""
    rows = Traced(
        scores=np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 1]], np.float32),
        chosen=np.array([[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]),
        full=np.zeros(4, int),
        right=np.zeros(4, int),
        layers=[2, 4, 6],
        n_layers=8,
    )
    kept, found = choose(rows, NO_LOSS, 0.01)
    assert kept == [2]
    assert found.saved == 0.25
    assert outcome(columns(rows, [0, 2]), 1.0, 0.01).time_saved > found.time_saved


def best_of_all(rows: Traced, limits: Limits, cost: float) -> Outcome:
    """Every set of checks at every threshold."""
    sets = itertools.chain.from_iterable(
        itertools.combinations(range(len(rows.layers)), n + 1) for n in range(len(rows.layers))
    )
    tried = [
        outcome(columns(rows, list(kept)), float(threshold), cost)
        for kept in sets
        for threshold in candidates(rows.scores)
    ]
    held = [one for one in tried if not limits.beyond(one.loss, one.changed)]
    return max(held, key=lambda one: one.time_saved)


@pytest.mark.parametrize("cost", [0.1, 1.0])
def test_the_choice_is_near_the_best_there_is(cost: float) -> None:
    """Where the limits bind nothing, of every set; else no better than that."""
    for seed, limits in itertools.product(range(3), (Limits(1.0), Limits(0.02, 0.1))):
        rows = drawn(seed, checks=4)
        kept, found = choose(rows, limits, cost)
        assert not limits.beyond(found.loss, found.changed)
        assert found == outcome(columns(rows, kept), found.threshold, cost)
        best = best_of_all(rows, limits, cost)
        assert found.time_saved <= best.time_saved + 1e-9
        if limits.loss == 1:
            assert found.time_saved == pytest.approx(best.time_saved)


def states(rows: int, seed: int) -> States:
    """The deeper, the more of the answer is in a state; of some rows at once."""
    draw = torch.Generator().manual_seed(seed)
    ease = torch.rand(rows, generator=draw)
    lead = torch.randn(rows, generator=draw)
    hidden = torch.randn((rows, 5, 16), generator=draw)
    hidden[:, :, 0] += 12 * lead[:, None] * ease[:, None] ** torch.arange(5, 0, -1)
    logits = torch.stack([lead, -lead], -1)
    answers = torch.tensor([[3, 7]] * rows)
    return States((1, 2, 3, 4, 5), hidden, logits, answers, logits.argmax(-1))


def test_a_fit_keeps_fewer_checks_where_they_are_dear(tiny: Path) -> None:
    """And so do the rules to beat."""
    pytest.importorskip("sklearn")
    model, tune, validation = opened(tiny), states(300, 0), states(300, 1)
    settings = Settings("probe", every=1, first=1, max_accuracy_loss=0.02)
    made = {}
    for cost in (0.01, 0.5):
        told = CheckCost(cost)
        rule, others = fit(model, tune, validation, ANSWERS, settings, model_sha256="", cost=told)
        assert rule.facts["check_cost"] == told.to_dict()
        found = rule.facts["validation"]
        assert found["loss"] <= 0.02 + 1e-9
        assert found["time_saved"] == pytest.approx(found["saved"] - cost * found["checks"] / 6)
        assert others["top"].facts["check_cost"] == told.to_dict()
        made[cost] = len(rule.layers), len(others["top"].layers)
    assert made[0.5][0] < made[0.01][0]
    assert made[0.5][1] < made[0.01][1]


def test_what_is_told_is_not_measured(tiny: Path) -> None:
    settings = Settings(check_cost=0.25, first=1)
    cost = check_cost(opened(tiny), prompts_of(tiny, 4), settings)
    assert cost == CheckCost(0.25)
    assert not cost.to_dict()["measured"]


NAP_S = 0.002


def napping(*given: Any) -> None:
    time.sleep(NAP_S)


@pytest.mark.parametrize("check", ["answers", "probe"])
def test_a_check_is_measured_against_a_layer(tiny: Path, check: str) -> None:
    """Layers take 2 ms longer than they would, norms (which `answers` reads, a probe does not) the
    same."""
    model = opened(tiny)
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(napping)
    model.get_decoder().norm.register_forward_pre_hook(napping)
    found = check_cost(model, prompts_of(tiny, 30), Settings(check, every=1, first=1))
    assert found.turns >= LEAST_TURNS
    assert found.layer_s is not None
    assert found.layer_s >= NAP_S
    assert found.device == "cpu"
    if check == "answers":
        assert 0.4 < found.layers < 1.3
    else:
        assert found.layers < 0.4
