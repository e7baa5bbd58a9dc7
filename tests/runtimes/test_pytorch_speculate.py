"""Speculation says what the whole model says, whatever drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.early_exits import opened, prompts_of

from shortstack.errors import ShortstackError
from shortstack.runtimes.pytorch_drafters import SkipDrafter
from shortstack.runtimes.pytorch_speculate import greedy, speculate

PROMPTS, TOKENS = 6, 24


def by_transformers(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """A pass over the whole text for each token, without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("skip", [(1,), (2, 3, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_the_tokens_are_the_whole_models(
    tiny: Path, skip: tuple[int, ...], draft_tokens: int
) -> None:
    model = opened(tiny)
    drafter = SkipDrafter(model, skip)
    for prompt in prompts_of(tiny, PROMPTS):
        found = speculate(drafter, prompt.tokens, TOKENS, draft_tokens, "cpu")
        wanted = greedy(model, prompt.tokens, TOKENS, "cpu")
        assert found.tokens == wanted == by_transformers(model, prompt.tokens, TOKENS)
        assert 0 <= found.accepted <= found.drafted
        assert len(found.tokens) <= 1 + found.passes + found.accepted
        assert found.least_margin > 0


def test_a_draft_of_the_whole_model_is_accepted_whole(tiny: Path) -> None:
    model = opened(tiny)
    found = speculate(SkipDrafter(model, ()), prompts_of(tiny, 1)[0].tokens, 25, 4, "cpu")
    assert found.accepted == found.drafted
    assert (found.passes, found.drafted) == (5, 19)  # 1 + 4 * (4 + 1) + (3 + 1) tokens


def test_less_of_a_model_drafts_worse(tiny: Path) -> None:
    model, prompts = opened(tiny), prompts_of(tiny, PROMPTS)

    def share(skip: tuple[int, ...]) -> float:
        found = [speculate(SkipDrafter(model, skip), p.tokens, TOKENS, 4, "cpu") for p in prompts]
        return sum(one.accepted for one in found) / sum(one.drafted for one in found)

    assert share((3,)) > share((1, 2, 3, 4, 5))


@pytest.mark.parametrize("name", ["gemma", "phi3", "granite"])
def test_families_say_their_own_tokens(name: str, tmp_path: Path) -> None:
    folder = zoo.make_model(name, tmp_path / name)
    model = opened(folder)
    for prompt in prompts_of(folder, 2):
        found = speculate(SkipDrafter(model, (3, 4)), prompt.tokens, 12, 3, "cpu")
        assert found.tokens == by_transformers(model, prompt.tokens, 12)


@pytest.mark.parametrize("layer", [0, 6])
def test_layers_that_cannot_be_skipped_are_refused(tiny: Path, layer: int) -> None:
    with pytest.raises(ShortstackError, match="name layers from 1 to 5"):
        SkipDrafter(opened(tiny), (layer,))


def test_windows_that_forget_are_refused(tmp_path: Path) -> None:
    folder = zoo.make_model("mistral-window", tmp_path / "model")
    with pytest.raises(ShortstackError, match="sliding windows forget"):
        SkipDrafter(opened(folder), (2,))


def test_nothing_is_generated_where_nothing_is_asked_for(tiny: Path) -> None:
    model = opened(tiny)
    found = speculate(SkipDrafter(model, (2,)), (1, 2), 0, 4, "cpu")
    assert (found.tokens, found.drafted, found.passes) == ((), 0, 0)
    assert greedy(model, (1, 2), 0, "cpu") == ()


@pytest.mark.parametrize(
    ("prompt", "count", "draft", "said"),
    [
        ((1, 2), 8, 0, "drafts of 0 tokens"),
        ((1, 2), -1, 4, "-1 tokens after a prompt of 2"),
        ((), 8, 4, "8 tokens after a prompt of 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    tiny: Path, prompt: tuple[int, ...], count: int, draft: int, said: str
) -> None:
    with pytest.raises(ShortstackError, match=said):
        speculate(SkipDrafter(opened(tiny), (2,)), prompt, count, draft, "cpu")
