"""Every family of the zoo: cut in files, opened by plain transformers, equal to a cut in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo import NAMES, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from shortstack.checkpoint import Checkpoint
from shortstack.families import layer_windows, rotates
from shortstack.pretrained import attention_of, config_of
from shortstack.prune import PrunePlan, apply_plan
from shortstack.prune.calibrate import LayerwiseModel

TOKENS = (torch.arange(48)[None] * 37 + 11) % 512
"""Three times the zoo's sliding window."""


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, **attention_of(config_of(folder))
    )
    model.eval()
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(TOKENS, use_cache=False).logits
    return result


def layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """A multimodal model nests them deeper."""
    inner: Any = model.model
    found: torch.nn.ModuleList = getattr(inner, "language_model", inner).layers
    return found


def skip(model: PreTrainedModel, layer: int) -> None:
    """Make a layer of the whole model pass its input on: no renumbering, no config."""

    def pass_on(module: torch.nn.Module, given: tuple[torch.Tensor, ...], made: object) -> object:
        # some layers return a tuple before transformers 5
        return (given[0], *made[1:]) if isinstance(made, tuple) else given[0]

    layers(model)[layer].register_forward_hook(pass_on)


@pytest.mark.parametrize("name", NAMES)
def test_running_layer_by_layer_gives_the_loss_of_the_whole_model(
    name: str, tmp_path: Path
) -> None:
    original = Checkpoint.open(make_model(name, tmp_path / "model"))
    layered = LayerwiseModel(original, "float32")
    with torch.inference_mode():
        hidden = layered.embed(TOKENS)
        for index in range(layered.n_layers):
            hidden = layered.layer(index, hidden)
        whole = torch.nn.functional.cross_entropy(
            logits(load(original.path))[0, :-1], TOKENS[0, 1:], reduction="sum"
        )
        assert layered.nats(hidden, TOKENS) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_layers_compute_what_they_did(name: str, tmp_path: Path) -> None:
    original = Checkpoint.open(make_model(name, tmp_path / "model"))
    out = tmp_path / "out"
    out.mkdir()
    plan = PrunePlan(original.n_layers, (1, 4, 6), "explicit")
    pruned = apply_plan(original, plan, out)
    whole = load(original.path)
    for layer in plan.drop:
        skip(whole, layer)
    assert torch.allclose(logits(load(out)), logits(whole), atol=2e-5)
    kinds = [
        (layer_windows(c.family, c.text), rotates(c.family, c.text)) for c in (original, pruned)
    ]
    for before, after in zip(*kinds, strict=True):
        assert after == tuple(before[index] for index in plan.keep)
