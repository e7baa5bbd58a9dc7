"""Batches whose rows leave after different layers give what each row gives alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import zoo
from tests.early_exits import fitted, opened, prompts_of

from shortstack.early_exit.checks import Checks, ModelHead
from shortstack.early_exit.rule import ANSWERS, PROBE, VOCABULARY, Rule
from shortstack.errors import ShortstackError
from shortstack.prune.early_exit.classifier import top_rule
from shortstack.prune.early_exit.fit import Settings, features_of
from shortstack.prune.early_exit.states import collect
from shortstack.runtimes.pytorch_early_exit import Answerer

LOOSE: dict[str, Any] = {"max_accuracy_loss": 0.9, "every": 1, "first": 1}


def halfway(rule: Rule, folder: Path) -> Rule:
    """The rule with biases at which some rows leave at every check, and none of which is a row's
    score: rounding differs between a batch and a row."""
    model, prompts = opened(folder), prompts_of(folder, 24, seed=3)
    features, _ = features_of(model, rule, collect(model, prompts, rule.layers))
    bias = []
    for scores in np.sort((features * rule.weights).sum(-1), axis=0).T:
        near = scores[len(scores) // 2 : -2]
        widest = int(np.diff(near).argmax())
        bias.append(-near[widest : widest + 2].mean())
    return dataclasses.replace(rule, bias=np.asarray(bias, np.float32))


def everywhere(folder: Path, check: str = ANSWERS) -> Rule:
    """Checks after every layer with the highest probability as the score."""
    model = opened(folder)
    layers = tuple(range(1, len(model.get_decoder().layers)))
    weights, bias = top_rule(len(layers), 3)
    extra: dict[str, Any] = {}
    if check == PROBE:
        width = model.config.get_text_config().hidden_size
        draw = np.random.default_rng(0)
        extra = {
            "answers": ("yes", "no"),
            "probe": draw.normal(size=(len(layers), 2, width)).astype(np.float32),
            "probe_bias": np.zeros((len(layers), 2), np.float32),
        }
    return halfway(Rule(layers, check, weights, bias, 0.0, "top", **extra), folder)


@pytest.mark.parametrize("check", [ANSWERS, PROBE, VOCABULARY])
def test_a_batch_answers_as_its_rows_alone(tiny: Path, check: str) -> None:
    rule = everywhere(tiny, check)
    answerer, prompts = Answerer(opened(tiny), rule), prompts_of(tiny, 24, seed=3)
    together = answerer.answer(prompts, batch_tokens=100_000)
    alone = [answerer.answer([prompt])[0] for prompt in prompts]
    assert together == alone
    assert len({answer.n_layers for answer in together}) > 2
    assert len({len(prompt.tokens) for prompt in prompts}) > 2


def test_answers_are_those_of_the_states_there(tiny: Path) -> None:
    """By hand: the first layer whose score holds, of a whole pass's hidden states."""
    rule, model = everywhere(tiny), opened(tiny)
    head = ModelHead(model)
    checks = Checks(rule, head)
    for prompt in prompts_of(tiny, 12, seed=3):
        with torch.inference_mode():
            ids = torch.tensor([prompt.tokens])
            out = model(input_ids=ids, output_hidden_states=True)
            rows = head.rows(torch.tensor([prompt.answers]))
            wanted = (int(out.logits[0, -1, list(prompt.answers)].argmax()), 6)
            for check, n_run in enumerate(rule.layers):
                score, said = checks.of_answers(check, out.hidden_states[n_run][:, -1], rows)
                if score >= rule.threshold:
                    wanted = (int(said), n_run)
                    break
        found = Answerer(model, rule).answer([prompt])[0]
        assert (found.chosen, found.n_layers) == wanted


@pytest.mark.parametrize("name", ["gemma3", "phi3", "olmo2", "granite", "qwen3-window"])
def test_families_answer_alike_in_batches(name: str, tmp_path: Path) -> None:
    folder = zoo.make_model(name, tmp_path / name)
    rule = everywhere(folder)
    answerer, prompts = Answerer(opened(folder), rule), prompts_of(folder, 12, seed=5)
    together = answerer.answer(prompts, batch_tokens=100_000)
    assert together == [answerer.answer([prompt])[0] for prompt in prompts]
    assert len({answer.n_layers for answer in together}) > 1


def test_without_a_rule_all_layers_are_run(tiny: Path) -> None:
    model, prompts = opened(tiny), prompts_of(tiny, 8)
    for prompt, answer in zip(prompts, Answerer(model).answer(prompts), strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
        assert answer.chosen == int(logits[list(prompt.answers)].argmax())
        assert answer.n_layers == 6


def test_layers_behind_an_exit_are_not_run(tiny: Path) -> None:
    """That a layer is saved is counted at the layer itself."""
    model, prompts = opened(tiny), prompts_of(tiny, 8)
    ran = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_hook(lambda *given: ran.append(1))
    weights, bias = top_rule(1, 3)
    rule = Rule((2,), ANSWERS, weights, bias, threshold=0.0)  # a probability is never less
    Answerer(model, rule).answer(prompts, batch_tokens=100_000)
    assert len(ran) == 2


def test_a_fitted_rule_saves_layers(tiny: Path) -> None:
    model, rule, prompts = fitted(tiny, Settings(**{**LOOSE, "max_accuracy_loss": 0.2}))
    answers = Answerer(model, rule).answer(prompts)
    assert sum(answer.n_layers for answer in answers) < 6 * len(prompts)


def test_a_probe_refuses_other_answers(tiny: Path) -> None:
    rule = dataclasses.replace(everywhere(tiny, PROBE), answers=("red", "blue"))
    with pytest.raises(ShortstackError, match="knows the answers red, blue, not yes, no"):
        Answerer(opened(tiny), rule).answer(prompts_of(tiny, 2))


def test_a_rule_for_a_deeper_model_is_refused(tiny: Path) -> None:
    rule = dataclasses.replace(everywhere(tiny), layers=(2, 3, 4, 5, 6))
    with pytest.raises(ShortstackError, match="after 6 layers, the model has 6"):
        Answerer(opened(tiny), rule)
