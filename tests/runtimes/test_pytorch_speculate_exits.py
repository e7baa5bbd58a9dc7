"""Drafts through an exit of shortstack exits train: the whole model's tokens, fewer layers run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.early_exits import opened, prompts_of

from shortstack.checkpoint import Checkpoint
from shortstack.runtimes.pytorch_drafters import ExitDrafter
from shortstack.runtimes.pytorch_speculate import greedy, speculate

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


def test_every_draft_of_a_perfect_exit_is_kept(tiny: Path) -> None:
    """An exit behind all layers but one, made of that one, is the whole model: n drafts bring
    n + 1 tokens a pass, the last pass what is left of 25."""
    drafter = ExitDrafter(exits_of(tiny, 5), 5)
    for length, passes, drafted in ((1, 12, 12), (3, 6, 18), (4, 5, 19)):
        found = speculate(drafter, prompts_of(tiny, 1)[0].tokens, 25, length, "cpu")
        assert (found.passes, found.drafted, found.accepted) == (passes, drafted, drafted)


@pytest.mark.parametrize("length", [1, 3])
def test_an_exit_that_is_always_wrong_costs_passes_only(tiny: Path, length: int) -> None:
    """The norm's negative turns logits round: the exit says the least likely token."""
    model = opened(tiny)
    tensors = exit_model.base_tensors(model, Checkpoint.open(tiny))
    tensors["norm.weight"] = -tensors["norm.weight"]
    exits = exit_model.with_tensors(model, {5: tensors})
    prompt = prompts_of(tiny, 1)[0].tokens
    found = speculate(ExitDrafter(exits, 5), prompt, 10, length, "cpu")
    assert (found.passes, found.accepted) == (9, 0)
    assert found.tokens == greedy(model, prompt, 10, "cpu")


def test_first_layers_run_once_and_the_others_at_verification_alone(tiny: Path) -> None:
    exits = exits_of(tiny, 3, noise=0.05)
    ran: list[tuple[int, int]] = []
    for index, layer in enumerate(exits.model.get_decoder().layers):

        def note(module: Any, given: Any, output: Any, index: int = index) -> None:
            ran.append((index, given[0].shape[-2]))

        layer.mlp.register_forward_hook(note)
    prompt = prompts_of(tiny, 1)[0].tokens
    found = speculate(ExitDrafter(exits, 3), prompt, 10, 3, "cpu")
    assert 0 < found.accepted < found.drafted
    drafts = [index for index, count in ran[6:] if index < 3]
    assert len(drafts) == 3 * (found.drafted + found.passes)  # what goes before each draft, too
    behind = [(index, count) for index, count in ran[6:] if index >= 3]
    assert len(behind) == 3 * found.passes
    assert sum(count for index, count in behind) == 3 * (found.drafted + found.passes)


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_what_was_refused_leaves_no_trace(tiny: Path, right: int) -> None:
    """After some of three drafts were kept, drafts and logits are those of a new cache."""
    exits = exits_of(tiny, 3, noise=0.05)
    prompt = torch.tensor([list(prompts_of(tiny, 1)[0].tokens)])
    used, fresh = ExitDrafter(exits, 3), ExitDrafter(exits, 3)
    with torch.inference_mode():
        used.start(prompt)
        token, after = torch.tensor([[5]]), torch.tensor([[7]])
        guess = used.draft(token, 3)
        used.verify(token, guess)
        used.keep(prompt.shape[1] + 1 + right)
        fresh.start(torch.cat([prompt, token, guess[:, :right]], 1))
        ours, wanted = used.draft(after, 3), fresh.draft(after, 3)
        assert ours.tolist() == wanted.tolist()
        torch.testing.assert_close(
            used.verify(after, ours), fresh.verify(after, wanted), atol=1e-5, rtol=1e-5
        )
