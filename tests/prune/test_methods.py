from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune import METHODS, planner
from shortstack.prune.calibrate import LayerwiseModel, batches
from shortstack.prune.leave_one_out import leave_one_out
from shortstack.prune.plan import Removal
from shortstack.text import open_corpus
from shortstack.tokens import Encoder

SCORED = sorted(name for name, method in METHODS.items() if method.needs_text)
BY_LAYER = [name for name in SCORED if not METHODS[name].sub_blocks]


@pytest.fixture(scope="module")
def windows(tiny: Path) -> list[list[int]]:
    return Encoder(Checkpoint.open(tiny)).windows(open_corpus("spdx").calibration, 64, 8)


@torch.inference_mode()
def naive_loss(folder: Path, windows: list[list[int]], without: int | None = None) -> float:
    """Mean nats a token of the whole transformers model, one layer taken out."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(model.model.layers) if index != without
    )
    tokens = torch.tensor(windows)
    return float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def random_windows(length: int = 24, count: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    drawn: list[list[int]] = torch.randint(0, 96, (count, length), generator=generator).tolist()
    return drawn


def test_explicit_drops_what_was_named(tiny: Path) -> None:
    plan = planner("explicit")(Checkpoint.open(tiny), drop=Removal((1, 4)), windows=[])
    assert (plan.drop, plan.method, plan.scores) == ((1, 4), "explicit", ())


def test_leave_one_out_equals_the_naive_loop(any_model: Path) -> None:
    windows = random_windows()
    checkpoint = Checkpoint.open(any_model)
    plan = planner("perplexity")(checkpoint, drop=2, windows=windows, dtype="float32")
    whole = naive_loss(any_model, windows)
    expected = [naive_loss(any_model, windows, without) - whole for without in (1, 2, 3)]
    assert plan.scores[0] is plan.scores[-1] is None
    assert plan.scores[1:-1] == pytest.approx(expected, abs=2e-6)
    ranked = sorted(range(3), key=lambda at: expected[at])
    assert plan.drop == tuple(sorted(at + 1 for at in ranked[:2]))


def test_leave_one_out_shares_the_layers_below_the_dropped_one(
    tiny: Path, windows: list[list[int]]
) -> None:
    model = LayerwiseModel(Checkpoint.open(tiny), "float32")
    (tokens,) = batches(windows)
    with torch.inference_mode():
        leave_one_out(model, tokens, range(6))
    assert model.evaluations == 6 + (5 + 4 + 3 + 2 + 1 + 0)
    assert model.evaluations <= 0.75 * 6 * 5  # the naive loop; falls to 0.5 with depth


def test_influence_runs_every_layer_once_and_ranks_the_trained_model(
    tiny: Path, windows: list[list[int]]
) -> None:
    calls: list[tuple[int, int]] = []
    plan = planner("influence")(
        Checkpoint.open(tiny), drop=2, windows=windows, progress=lambda *at: calls.append(at)
    )
    assert calls == [(done, 6) for done in range(1, 7)]
    assert all(score is not None and 0 < score < 2 for score in plan.scores)
    assert set(plan.drop) <= {1, 2, 3, 4}


def test_influence_is_one_minus_the_cosine_of_hidden_states(any_model: Path) -> None:
    windows = random_windows()
    plan = planner("influence")(
        Checkpoint.open(any_model), drop=1, windows=windows, dtype="float32"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(any_model, dtype=torch.float32)
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        layer.register_forward_hook(lambda *given: states.append(given[2]))
    with torch.inference_mode():
        model(input_ids=torch.tensor(windows), use_cache=False)
    cosines = [
        torch.cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in zip(states[::2], states[1::2], strict=True)
    ]
    assert plan.scores == pytest.approx([1 - cosine for cosine in cosines], abs=1e-6)


def test_both_types_rank_the_trained_model_alike(tiny: Path, windows: list[list[int]]) -> None:
    plans = [
        planner("perplexity")(Checkpoint.open(tiny), drop=2, windows=windows, dtype=dtype)
        for dtype in ("bfloat16", "float32")
    ]
    assert plans[0].drop == plans[1].drop
    assert [plan.facts["dtype"] for plan in plans] == ["bfloat16", "float32"]


def test_progress_ends_at_its_total(tiny: Path, windows: list[list[int]]) -> None:
    calls: list[tuple[int, int]] = []
    planner("perplexity")(
        Checkpoint.open(tiny), drop=1, windows=windows, progress=lambda *at: calls.append(at)
    )
    assert calls[-1][0] == calls[-1][1] == len(calls)


def test_batches_do_not_change_the_scores(
    tiny: Path, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Callable[[], Any] = lambda: planner("perplexity")(  # noqa: E731  # called twice
        Checkpoint.open(tiny), drop=1, windows=windows, dtype="float32"
    )
    whole = plan()
    monkeypatch.setattr("shortstack.prune.calibrate.BATCH_TOKENS", 3 * 64)
    assert plan().scores[1:-1] == pytest.approx(whole.scores[1:-1], abs=1e-6)


def test_unprotected_ends_may_go(tiny: Path, windows: list[list[int]]) -> None:
    plan = planner("influence")(
        Checkpoint.open(tiny), drop=5, windows=windows, protect_first=0, protect_last=0
    )
    assert len(plan.drop) == 5


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ShortstackError, match="Did you mean 'influence'"):
        planner("influense")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_option_that_no_method_knows_is_refused(name: str, tiny: Path) -> None:
    with pytest.raises(ShortstackError, match="unknown option of method"):
        planner(name)(Checkpoint.open(tiny), drop=Removal((1,)), windows=[[1, 2]], protect_frist=1)


@pytest.mark.parametrize("name", BY_LAYER)
@pytest.mark.parametrize(
    ("drop", "options", "words"),
    [
        (0, {}, "cannot drop 0 of 6 layers"),
        (5, {}, "4 may go .* Ask for 1 to 4"),
        (6, {"protect_first": 0, "protect_last": 0}, "Ask for 1 to 5"),
    ],
)
def test_a_count_that_cannot_be_met_is_refused(
    tiny: Path, name: str, drop: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ShortstackError, match=words):
        planner(name)(Checkpoint.open(tiny), drop=drop, windows=[[1, 2, 3]], **options)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize(
    ("drop", "windows", "options", "words"),
    [
        ((1, 2), [[1, 2, 3]], {}, "chooses the layers itself"),
        (1, [[1, 2, 3]], {"protect_first": -1}, "cannot protect -1 layers"),
        (1, [], {}, "reads text"),
        (1, [[1, 2], [1, 2, 3]], {}, "must have one length"),
        (1, [[1]], {}, "at least 2"),
        (1, [[1, 2, 3]], {"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    tiny: Path, name: str, drop: Any, windows: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ShortstackError, match=words):
        planner(name)(Checkpoint.open(tiny), drop=drop, windows=windows, **options)


def test_explicit_wants_layer_numbers(tiny: Path) -> None:
    with pytest.raises(ShortstackError, match="needs layer numbers, got the count 3"):
        planner("explicit")(Checkpoint.open(tiny), drop=3, windows=[])
