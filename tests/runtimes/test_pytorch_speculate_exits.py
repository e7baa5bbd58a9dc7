"""Drafts through an exit of shortstack exits train: the whole model's tokens, fewer layers run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.early_exits import opened, prompts_of

from shortstack.checkpoint import Checkpoint
from shortstack.runtimes.pytorch_speculate import ExitDrafter, greedy, speculate

exit_model = pytest.importorskip("shortstack.exits.model")
TOKENS = 24


def exits_of(folder: Path, depth: int, noise: float = 0.0) -> Any:
    model = opened(folder)
    tensors = exit_model.base_tensors(model, Checkpoint.open(folder))
    torch.manual_seed(0)
    noisy = {name: tensor + noise * torch.randn_like(tensor) for name, tensor in tensors.items()}
    return exit_model.with_tensors(model, {depth: noisy})


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("draft_tokens", [1, 2, 5])
def test_the_tokens_are_the_whole_models(tiny: Path, depth: int, draft_tokens: int) -> None:
    exits = exits_of(tiny, depth)
    drafter = ExitDrafter(exits, depth)
    for prompt in prompts_of(tiny, 5):
        found = speculate(drafter, prompt.tokens, TOKENS, draft_tokens, "cpu")
        assert found.tokens == greedy(exits.model, prompt.tokens, TOKENS, "cpu")


def test_the_last_layer_as_its_own_exit_is_always_right(tiny: Path) -> None:
    """An exit behind all layers but one, made of that one, is the whole model."""
    drafter = ExitDrafter(exits_of(tiny, 5), 5)
    found = speculate(drafter, prompts_of(tiny, 1)[0].tokens, 25, 4, "cpu")
    assert found.accepted == found.drafted == 24
    assert found.passes == 6


def test_verification_runs_the_layers_behind_the_exit_alone(tiny: Path) -> None:
    exits = exits_of(tiny, 3, noise=0.05)
    ran: list[tuple[int, int]] = []
    for index, layer in enumerate(exits.model.get_decoder().layers):

        def note(module: Any, given: Any, output: Any, index: int = index) -> None:
            ran.append((index, given[0].shape[-2]))

        layer.mlp.register_forward_hook(note)
    prompt = prompts_of(tiny, 1)[0].tokens
    found = speculate(ExitDrafter(exits, 3), prompt, 10, 3, "cpu")
    assert 0 < found.accepted < found.drafted
    drafts = [index for index, count in ran if count == 1 and index < 3]
    assert len(drafts) == 3 * found.drafted  # the first layers ran once for each drafted token
    behind = [index for index, count in ran if index >= 3]
    assert len(behind) == 3 * (found.passes + 1)  # and the prompt
