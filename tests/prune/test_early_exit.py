"""Fits of early exits: thresholds by hand, probes and classifiers on states with a known rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.early_exits import ANSWERS, fitted, opened, prompts_of

from shortstack.early_exit.numbers import probability_features, unit
from shortstack.early_exit.rule import PROBE, Rule
from shortstack.errors import SettingError, ShortstackError
from shortstack.prune.early_exit.calibrate import Limits, Traced, calibrated, depth_rule, outcome
from shortstack.prune.early_exit.classifier import CLASSIFIERS, SURE, fit_classifier, top_rule
from shortstack.prune.early_exit.fit import Settings, fit, trace, with_checks
from shortstack.prune.early_exit.probe import fit_probe
from shortstack.prune.early_exit.states import collect


def traced() -> Traced:
    """Four rows, checks after 2 and 4 of 8 layers; row 3 is wrong at both checks."""
    return Traced(
        scores=np.array([[0.9, 0.9], [0.2, 0.8], [0.5, 0.6], [0.7, 0.7]], np.float32),
        chosen=np.array([[0, 0], [1, 0], [0, 0], [1, 1]]),
        full=np.array([0, 0, 0, 0]),
        right=np.array([0, 0, 1, 0]),
        layers=[2, 4],
        n_layers=8,
    )


def test_rows_leave_at_the_first_check_that_holds() -> None:
    found = outcome(traced(), 0.75)
    # rows 0 and 1 leave after 2 and 4 layers, the others not at all
    assert found.saved == pytest.approx(1 - (2 + 4 + 8 + 8) / 32)
    assert (found.loss, found.changed) == (0.0, 0.0)
    low = outcome(traced(), 0.0)
    assert low.saved == 0.75
    assert low.changed == 0.5  # rows 1 and 3
    assert low.loss == pytest.approx(0.5)  # both were right


def test_the_threshold_saves_most_at_the_loss() -> None:
    assert calibrated(traced(), Limits(0.0)).threshold == pytest.approx(0.8)
    one = calibrated(traced(), Limits(0.25))  # row 3 may be lost
    assert one.threshold == pytest.approx(0.5)
    assert one.loss == 0.25


def test_changed_answers_are_limited_where_losses_and_gains_cancel() -> None:
    rows = traced()
    cancelling = Traced(
        rows.scores, rows.chosen, rows.full, np.array([1, 1, 1, 0]), rows.layers, rows.n_layers
    )
    assert calibrated(cancelling, Limits(0.0)).changed == 0.5  # one lost, one won
    assert calibrated(cancelling, Limits(0.0, changed=0.0)).threshold == pytest.approx(0.8)


def test_a_loss_that_cannot_hold_says_the_best_that_is_possible() -> None:
    rows = traced()
    wrong = Traced(rows.scores, 1 - rows.chosen * 0, rows.full, rows.full, [2, 4], 8)
    with pytest.raises(ShortstackError, match=r"loses 0\.2500, changes 0\.2500 and saves 18\.8%"):
        calibrated(wrong, Limits(0.1))


def test_the_depth_rule_takes_the_first_check_that_holds() -> None:
    rows = traced()
    assert depth_rule(rows, Limits(0.25)).threshold == 4
    assert depth_rule(rows, Limits(0.5)).threshold == 2
    assert depth_rule(rows, Limits(0.0)).saved == 0.0


def test_features_are_those_of_a_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 3.0, 1.0]])
    p = logits.softmax(-1).sort(-1, descending=True).values
    found = probability_features(logits)
    assert torch.allclose(found[:, 0], p[:, 0])
    assert torch.allclose(found[:, 1], p[:, 0] - p[:, 1])
    assert torch.allclose(found[:, 2], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("kind", sorted(CLASSIFIERS))
def test_a_classifier_finds_the_feature_that_tells(kind: str) -> None:
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    features = draw.normal(size=(200, 2, 3)).astype(np.float32) * [1.0, 100.0, 1e-3]
    same = np.stack([features[:, 0, 1] > 20, np.ones(200, bool)], axis=1)
    weights, bias = fit_classifier(kind, features.astype(np.float32), same)
    scores = (features * weights).sum(-1) + bias
    assert ((scores[:, 0] >= 0) == same[:, 0]).mean() > 0.95
    assert (scores[:, 1] == SURE).all()


def test_a_probe_gives_the_logits_that_a_state_holds() -> None:
    torch.manual_seed(0)
    states = torch.randn(400, 2, 64)
    secret = torch.randn(64, 3)
    logits = unit(states[:, 0]) @ secret
    probe, bias = fit_probe(states, logits)
    unseen = torch.randn(100, 64)
    said = (unit(unseen) @ torch.from_numpy(probe[0]).T + torch.from_numpy(bias[0])).argmax(-1)
    right = (said == (unseen @ secret).argmax(-1)).float().mean()
    assert right > 0.9
    assert np.abs(probe[1]).mean() < np.abs(probe[0]).mean()  # nothing is there to be learnt


def test_a_probe_is_the_same_by_both_forms() -> None:
    """As many rows as dimensions, and one more, are solved by different equations."""
    torch.manual_seed(0)
    states, logits = torch.randn(32, 1, 32), torch.randn(32, 3)
    direct, _ = fit_probe(states, logits)
    # a row that comes twice counts twice: the same least squares with rows > dimensions
    twice, _ = fit_probe(states.repeat(2, 1, 1)[:, :, :32], logits.repeat(2, 1))
    dual, _ = fit_probe(states[:31], logits[:31])
    assert np.allclose(direct, twice, atol=1e-5)
    assert np.abs(dual - direct).mean() < np.abs(direct).mean()


def test_states_are_those_of_a_whole_pass(tiny: Path) -> None:
    model, prompts = opened(tiny), prompts_of(tiny, 8)
    found = collect(model, prompts, (2, 5), batch_tokens=1000)
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([prompt.tokens]), output_hidden_states=True)
        for place, n_run in enumerate((2, 5)):
            wanted = out.hidden_states[n_run][0, -1]
            assert torch.allclose(found.hidden[row, place], wanted, atol=1e-4)
        assert torch.allclose(found.logits[row], out.logits[0, -1, list(prompt.answers)], atol=1e-4)


@pytest.mark.parametrize("check", ["answers", "probe"])
def test_the_rule_holds_its_loss_on_its_validation_rows(tiny: Path, check: str) -> None:
    pytest.importorskip("sklearn")
    settings = Settings(check=check, every=1, first=1, max_accuracy_loss=0.1)
    model, prompts = opened(tiny), prompts_of(tiny, 96)
    # of all layers, though the rule may have dropped checks
    tune, validation = (
        collect(model, part, (1, 2, 3, 4, 5)) for part in (prompts[:32], prompts[32:64])
    )
    rule, others = fit(model, tune, validation, ANSWERS, settings, model_sha256="")
    found = rule.facts["validation"]
    assert found["loss"] <= 0.1
    assert found["saved"] == found["time_saved"] > 0
    assert outcome(trace(model, rule, validation), rule.threshold).loss == found["loss"]
    assert set(others) == {"top", "depth"}
    for other in others.values():
        said = outcome(trace(model, other, validation), other.threshold)
        assert said.loss == other.facts["validation"]["loss"] <= 0.1
        assert said.saved == pytest.approx(other.facts["validation"]["saved"])


def test_a_rule_of_some_checks_reads_their_layers(tiny: Path) -> None:
    model, rule, prompts = fitted(tiny, Settings(every=1, first=1, max_accuracy_loss=0.5))
    states = collect(model, prompts, (1, 2, 3, 4, 5))
    width = len(rule.weights[0])
    whole = Rule((1, 2, 3, 4, 5), "answers", *top_rule(5, width), threshold=0.5, n_layers=6)
    some = trace(model, with_checks(whole, [1, 3]), states)
    assert np.array_equal(some.scores, trace(model, whole, states).scores[:, [1, 3]])


def test_a_probe_wants_one_list_of_answers(tiny: Path) -> None:
    model, prompts = opened(tiny), prompts_of(tiny, 32)
    states = collect(model, prompts, (2, 4))
    with pytest.raises(ShortstackError, match="several. Use --check answers"):
        fit(model, states, states, (), Settings(check=PROBE), model_sha256="")


def test_too_few_rows_are_refused(tiny: Path) -> None:
    model = opened(tiny)
    states = collect(model, prompts_of(tiny, 4), (2,))
    with pytest.raises(ShortstackError, match="there are 4 tune rows; 16 are needed"):
        fit(model, states, states, (), Settings(), model_sha256="")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"check": "guess"}, {"classifier": "tree"}, {"every": 0}, {"max_accuracy_loss": 1.0}),
        *({"check_cost": -0.1}, {"check_cost": float("nan")}, {"check_cost": float("inf")}),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        Settings(**wrong)  # type: ignore[arg-type]  # on purpose


def test_a_model_too_shallow_for_the_checks_is_refused() -> None:
    with pytest.raises(ShortstackError, match="no check fits"):
        Settings(first=6).layers(6)
