"""How long a check takes here, against a layer: as they are run, one prompt at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from shortstack.early_exit.cost import CheckCost
from shortstack.progress import OnProgress, silent

if TYPE_CHECKING:
    from shortstack.early_exit.batches import Batch
    from shortstack.early_exit.prompts import Prompt
    from shortstack.early_exit.rule import Rule
    from shortstack.prune.early_exit.fit import Settings
    from shortstack.runtimes.pytorch_early_exit import Answerer

PROMPTS, TURNS, LEAST_TURNS = 5, 9, 2
BUDGET_S = 3.0
"""Behind it only LEAST_TURNS are waited for."""
DECIMALS = 3
"""What is printed is what is used, so that `--check-cost` repeats a fit."""


def check_cost(
    model: Any, prompts: Sequence[Prompt], settings: Settings, progress: OnProgress = silent
) -> CheckCost:
    """What the settings say, else measured on some of `prompts` with `model` where it is.

    In turns, all the time on the host's clock, behind answers that are on the host:
    whole = no check; checked = every check of the settings, at none of which a prompt leaves;
    leaving = one of the kind `answers` half way up, where each leaves, which costs what the end of
    a whole pass does. Of each prompt the shortest of its turns counts, as what disturbs only adds;
    medians over prompts of check = (checked - whole) / checks and layer = (whole - leaving) /
    (layers not run).
    """
    if settings.check_cost is not None:
        return CheckCost(settings.check_cost)
    from shortstack.early_exit.batches import batches
    from shortstack.early_exit.rule import ANSWERS
    from shortstack.runtimes.pytorch_early_exit import Answerer

    whole = Answerer(model)
    layers = settings.layers(whole.n_layers)
    middle = min(layers, key=lambda n_run: abs(2 * n_run - whole.n_layers))
    shape = (model.config.get_text_config().hidden_size, len(prompts[0].answers))
    answerers = {
        "whole": whole,
        "checked": Answerer(model, _rule(settings.check, layers, inf, *shape)),
        "leaving": Answerer(model, _rule(ANSWERS, (middle,), -inf, *shape)),
    }
    parts = list(batches(_spread(prompts), whole.device, 1))
    took, turns = _timed(answerers, parts, progress)
    check_s = max(0.0, _difference(took["checked"], took["whole"]) / len(layers))
    layer_s = _difference(took["whole"], took["leaving"]) / (whole.n_layers - middle)
    if layer_s <= 0:  # a model of microseconds on a busy machine
        layer_s = statistics.median(took["whole"]) / whole.n_layers
    cost = max(round(check_s / layer_s, DECIMALS), 10**-DECIMALS)  # 0 is another way to choose
    return CheckCost(cost, layer_s, check_s, turns, str(whole.device))


def _rule(check: str, layers: Sequence[int], threshold: float, width: int, answers: int) -> Rule:
    """Zeros take as long as what a fit gives."""
    import numpy as np

    from shortstack.early_exit.rule import FEATURES, PROBE, Rule

    count, more = len(layers), dict[str, Any]()
    if check == PROBE:
        more = {
            "answers": tuple(map(str, range(answers))),
            "probe": np.zeros((count, answers, width), np.float32),
            "probe_bias": np.zeros((count, answers), np.float32),
        }
    weights = np.zeros((count, len(FEATURES)), np.float32)
    return Rule(tuple(layers), check, weights, np.zeros(count, np.float32), threshold, **more)


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """PROMPTS of them, of all lengths there are, about as often."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    return [ordered[(2 * at + 1) * len(ordered) // (2 * PROMPTS)] for at in range(PROMPTS)]


def _timed(
    answerers: Mapping[str, Answerer], parts: Sequence[Batch], progress: OnProgress
) -> tuple[dict[str, list[float]], int]:
    """(each one's shortest seconds for every prompt, how often each was timed)."""
    names = list(answerers)
    took = {name: [inf] * len(parts) for name in names}
    for batch in parts:  # the first pass of each kind and shape sets libraries up
        for name in names:
            answerers[name].answer_batch(batch)
    begun = time.perf_counter()
    for turn in range(TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() - begun > BUDGET_S:
            return took, turn
        for place, batch in enumerate(parts):
            for at in range(len(names)):
                name = names[(turn + at) % len(names)]
                start = time.perf_counter()
                answerers[name].answer_batch(batch)
                took[name][place] = min(took[name][place], time.perf_counter() - start)
        progress(turn + 1, TURNS)
    return took, TURNS


def _difference(more: Sequence[float], less: Sequence[float]) -> float:
    return statistics.median(a - b for a, b in zip(more, less, strict=True))
