"""From prompts to a rule: states, check, classifier, threshold; and the rules to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shortstack.early_exit.checks import Checks, ModelHead
from shortstack.early_exit.cost import FREE, CheckCost
from shortstack.early_exit.rule import ANSWERS, FEATURES, PROBE, VOCABULARY, Rule
from shortstack.errors import SettingError, ShortstackError
from shortstack.prune.early_exit.calibrate import Limits, Outcome, Traced, depth_rule
from shortstack.prune.early_exit.choose import choose
from shortstack.prune.early_exit.classifier import CLASSIFIERS, fit_classifier, top_rule
from shortstack.prune.early_exit.probe import fit_probe
from shortstack.prune.early_exit.states import States

LEAST_ROWS = 16
"""Fewer rows than these decide nothing."""
FOR_ANSWERS = (ANSWERS, PROBE, VOCABULARY)
TOP, DEPTH = "top", "depth"
"""Rules without a classifier: a fixed threshold on the highest probability; one depth for all."""


@dataclass(frozen=True)
class Settings:
    """`every`: layers between checks; `first`: layers before the first one; `check_cost`: a
    check's time in layers, None to measure it."""

    check: str = ANSWERS
    classifier: str = "logistic"
    every: int = 2
    first: int = 2
    max_accuracy_loss: float = 0.01
    max_changed: float | None = None
    check_cost: float | None = None

    def __post_init__(self) -> None:
        if self.check not in FOR_ANSWERS:
            raise SettingError(
                "check", f"is {self.check!r}, it must be one of: {', '.join(FOR_ANSWERS)}"
            )
        if self.classifier not in (*CLASSIFIERS, TOP):
            known = ", ".join((*CLASSIFIERS, TOP))
            raise SettingError("classifier", f"is {self.classifier!r}, it must be one of: {known}")
        for name in ("every", "first"):
            if getattr(self, name) < 1:
                raise SettingError(name, "must be at least 1")
        if not 0 <= self.max_accuracy_loss < 1:
            raise SettingError("max_accuracy_loss", "must be from 0 to below 1, as 0.01")
        if self.max_changed is not None and not 0 <= self.max_changed <= 1:
            raise SettingError("max_changed", "must be from 0 to 1, as 0.05")
        if self.check_cost is not None and not 0 <= self.check_cost < float("inf"):
            raise SettingError("check_cost", "must be 0 or more layers, as 0.25")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_accuracy_loss, self.max_changed)

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Numbers of layers after which it is checked. Raises ShortstackError for none."""
        found = tuple(range(self.first, n_layers, self.every))
        if not found:
            raise ShortstackError(
                f"the model has {n_layers} layers: no check fits after {self.first} and every "
                f"{self.every}. Ask for smaller numbers."
            )
        return found


def fit(
    model: Any,
    tune: States,
    validation: States,
    words: tuple[str, ...],
    settings: Settings,
    *,
    model_sha256: str,
    cost: CheckCost = FREE,
) -> tuple[Rule, dict[str, Rule]]:
    """The rule and the rules to beat (`_baselines`). `words`: the answers, where they are the same
    for all rows; else empty. `cost`: of a check where `model` runs.

    Classifier and probe see `tune`, checks and threshold are chosen on `validation`. Raises
    ShortstackError for too few rows, a probe for rows with different answers, and a loss that no
    threshold holds.
    """
    check_rows({"tune": len(tune.right), "validation": len(validation.right)})
    rule = _fitted(model, tune, words, settings)
    n_layers = len(model.get_decoder().layers)
    rule = dataclasses.replace(rule, n_layers=n_layers, model_sha256=model_sha256)
    traced = trace(model, rule, validation)
    kept, found = choose(traced, settings.limits, cost.layers)
    facts = {
        "settings": dataclasses.asdict(settings),
        "rows": {"tune": len(tune.right), "validation": len(validation.right)},
        "check_cost": cost.to_dict(),
        "agreement": _agreement(traced),
    }
    rule = dataclasses.replace(rule, facts=facts)
    others = _baselines(model, rule, validation, settings.limits, cost)
    return _with(with_checks(rule, kept), found), others


def check_rows(counts: Mapping[str, int]) -> None:
    """Raise ShortstackError for too few rows of a part."""
    for name, count in counts.items():
        if count < LEAST_ROWS:
            raise ShortstackError(
                f"there are {count} {name} rows; {LEAST_ROWS} are needed. Give more questions."
            )


def _fitted(model: Any, tune: States, words: tuple[str, ...], settings: Settings) -> Rule:
    checks = len(tune.layers)
    weights, bias = top_rule(checks, len(FEATURES))
    if settings.check == PROBE:
        if not words:
            raise ShortstackError(
                "a probe is fitted to one list of answers, these rows have several. "
                "Use --check answers or --answers letters."
            )
        probe, probe_bias = fit_probe(tune.hidden, tune.logits)
        rule = Rule(
            *(tune.layers, PROBE, weights, bias, 0.0, TOP),
            answers=words,
            probe=probe,
            probe_bias=probe_bias,
        )
    else:
        rule = Rule(tune.layers, settings.check, weights, bias, 0.0, TOP)
    if settings.classifier == TOP:
        return rule
    features, chosen = features_of(model, rule, tune)
    same = chosen == tune.full.numpy()[:, None]
    weights, bias = fit_classifier(settings.classifier, features, same)
    return dataclasses.replace(rule, weights=weights, bias=bias, kind=settings.classifier)


def features_of(
    model: Any, rule: Rule, states: States
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(features (rows, checks, n), answers (rows, checks)): what the runtime would see.

    `states` may be of more layers than the rule checks.
    """
    head = ModelHead(model)
    checks = Checks(rule, head)
    features, chosen = [], []
    rows = head.rows(states.answers)
    with torch.inference_mode():
        for check in range(len(rule.layers)):
            column = states.layers.index(rule.layers[check])
            hidden = states.hidden[:, column].to(head.device, head.dtype)
            logits, seen = checks.answer_features(check, hidden, rows)
            features.append(seen.cpu())
            chosen.append(logits.argmax(-1).cpu())
    return torch.stack(features, 1).numpy(), torch.stack(chosen, 1).numpy()


def trace(model: Any, rule: Rule, states: States) -> Traced:
    """Scores and answers of every row at every check."""
    features, chosen = features_of(model, rule, states)
    scores = np.einsum("rcf,cf->rc", features, rule.weights) + rule.bias
    full, right = states.full.numpy(), states.right.numpy()
    return Traced(scores.astype(np.float32), chosen, full, right, rule.layers, rule.n_layers)


def _baselines(
    model: Any, rule: Rule, validation: States, limits: Limits, cost: CheckCost
) -> dict[str, Rule]:
    """The rules to beat, with the same check, chosen as `rule` is from all checks, held to the same
    loss: `top` leaves at a fixed highest probability, `depth` always after the same layers. One
    that saves nothing within it is not there."""
    weights, bias = top_rule(len(rule.layers), rule.weights.shape[1])
    plain = dataclasses.replace(rule, weights=weights, bias=bias, kind=TOP)
    traced = trace(model, plain, validation)
    found = {}
    try:
        kept, best = choose(traced, limits, cost.layers)
        found[TOP] = _with(with_checks(plain, kept), best)
    except ShortstackError:
        pass  # no such rule holds the loss
    depth = depth_rule(traced, limits, cost.layers)
    if depth.time_saved > 0:
        there = [rule.layers.index(int(depth.threshold))]
        always = with_checks(dataclasses.replace(plain, weights=weights * 0, kind=DEPTH), there)
        found[DEPTH] = _with(always, dataclasses.replace(depth, threshold=0.0))
    return found


def _with(rule: Rule, found: Outcome) -> Rule:
    facts = {**rule.facts, "validation": found.to_dict()}
    return dataclasses.replace(rule, threshold=found.threshold, facts=facts)


def with_checks(rule: Rule, kept: Sequence[int]) -> Rule:
    """The rule with some of its checks alone."""
    at = list(kept)
    return dataclasses.replace(
        rule,
        layers=tuple(rule.layers[check] for check in at),
        weights=rule.weights[at],
        bias=rule.bias[at],
        probe=None if rule.probe is None else rule.probe[at],
        probe_bias=None if rule.probe_bias is None else rule.probe_bias[at],
    )


def _agreement(traced: Traced) -> dict[str, float]:
    """Layers run -> share of rows whose answer there is the final one already."""
    same = (traced.chosen == traced.full[:, None]).mean(0)
    return {str(n): round(float(share), 4) for n, share in zip(traced.layers, same, strict=True)}
