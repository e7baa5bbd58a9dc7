"""Drafts that may say some tokens only: the output is the whole model's all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import zoo
from tests.early_exits import opened, prompts_of

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune.early_exit.frequent import frequent_tokens
from shortstack.runtimes.pytorch_drafters import ExitDrafter, SkipDrafter
from shortstack.runtimes.pytorch_speculate import Drafter, greedy, speculate

exit_model = pytest.importorskip("shortstack.exits.model")
TOKENS = 25


def perfect_exit(model: Any, folder: Path, vocabulary: Any, **more: Any) -> Drafter:
    tensors = exit_model.base_tensors(model, Checkpoint.open(folder))
    return ExitDrafter(
        exit_model.with_tensors(model, {5: tensors}), 5, vocabulary=vocabulary, **more
    )


def nothing_skipped(model: Any, folder: Path, vocabulary: Any, **more: Any) -> Drafter:
    return SkipDrafter(model, (), vocabulary=vocabulary, **more)


@pytest.mark.parametrize("drafter_of", [perfect_exit, nothing_skipped])
def test_a_draft_says_what_it_may(tiny: Path, drafter_of: Callable[..., Drafter]) -> None:
    model, prompt = opened(tiny), prompts_of(tiny, 1)[0].tokens
    wanted = greedy(model, prompt, TOKENS, "cpu")
    everything = speculate(drafter_of(model, tiny, sorted(set(wanted))), prompt, TOKENS, 4, "cpu")
    assert everything.accepted == everything.drafted == 19
    rare = wanted[3]
    without = [token for token in range(model.vocab_size) if token != rare]
    found = speculate(drafter_of(model, tiny, without), prompt, TOKENS, 1, "cpu")
    assert found.tokens == wanted
    assert found.accepted < found.drafted
    assert found.drafted - found.accepted <= wanted.count(rare)


@pytest.mark.parametrize("drafter_of", [perfect_exit, nothing_skipped])
def test_what_was_said_may_be_said_again(tiny: Path, drafter_of: Callable[..., Drafter]) -> None:
    """A vocabulary of one token that is never said: drafts know the prompt's and the output's."""
    model, prompt = opened(tiny), prompts_of(tiny, 1)[0].tokens
    wanted = greedy(model, prompt, TOKENS, "cpu")
    never = next(t for t in range(model.vocab_size) if t not in {*prompt, *wanted})
    known, drafted, accepted, at = {never, *prompt}, 0, 0, 0
    while at + 1 < TOKENS:
        known.add(wanted[at])
        asked = at + 2 < TOKENS  # the last token needs no draft
        right = asked and wanted[at + 1] in known
        drafted, accepted, at = drafted + asked, accepted + right, at + 1 + right
    drafter = drafter_of(model, tiny, [never])
    for _ in range(2):  # a new text begins with what it knows
        found = speculate(drafter, prompt, TOKENS, 1, "cpu")
        assert found.tokens == wanted
        assert (found.drafted, found.accepted) == (drafted, accepted)
    assert 0 < accepted < drafted


@pytest.mark.parametrize("drafter_of", [perfect_exit, nothing_skipped])
def test_drafts_end_before_a_token_that_is_not_sure(
    tiny: Path, drafter_of: Callable[..., Drafter]
) -> None:
    model, prompt = opened(tiny), prompts_of(tiny, 1)[0].tokens
    ids = torch.tensor([[*prompt, *greedy(model, prompt, TOKENS, "cpu")]])
    with torch.inference_mode():
        said = model(input_ids=ids).logits[0, len(prompt) : -2].softmax(-1).amax(-1)
    least = float(said.sort().values[[9, 10]].mean())
    found = speculate(
        drafter_of(model, tiny, None, least_probability=least), prompt, TOKENS, 1, "cpu"
    )
    assert found.accepted == found.drafted  # it is the whole model
    assert found.passes == TOKENS - 1 - found.drafted
    assert found.tokens == greedy(model, prompt, TOKENS, "cpu")
    assert 0 < found.drafted < 12


@pytest.mark.parametrize("least", [-0.1, 1.0])
def test_what_is_no_probability_is_refused(tiny: Path, least: float) -> None:
    with pytest.raises(ShortstackError, match="is no probability below which drafts end"):
        SkipDrafter(opened(tiny), (), least_probability=least)


@pytest.mark.parametrize("family", ["gemma", "granite"])
def test_families_say_their_own_tokens(family: str, tmp_path: Path) -> None:
    folder = zoo.make_model(family, tmp_path / family)
    model, prompt = opened(folder), prompts_of(folder, 1)[0].tokens
    own = sorted(set(greedy(model, prompt, 13, "cpu")))
    found = speculate(nothing_skipped(model, folder, own), prompt, 13, 3, "cpu")
    assert found.accepted == found.drafted == 9


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ([], "at least one"),
        ([1.5, 2.0], "whole numbers"),
        ([3, -1], "token -1 of the vocabulary of drafts is none"),
        (np.array([10**6]), "token 1000000 of the vocabulary of drafts is none"),
    ],
)
def test_what_is_no_vocabulary_of_the_model_is_refused(
    tiny: Path, vocabulary: Sequence[int], said: str
) -> None:
    model = opened(tiny)
    for drafter_of in (perfect_exit, nothing_skipped):
        with pytest.raises(ShortstackError, match=said):
            drafter_of(model, tiny, vocabulary)


def test_frequent_tokens_are_counted_over_documents() -> None:
    documents = [[7, 7, 2, 9], [2, 7, 5], [5]]  # 7 three times, 2 and 5 twice, 9 once
    assert frequent_tokens(documents, 1).tolist() == [7]
    assert frequent_tokens(documents, 2).tolist() == [2, 7]
    assert frequent_tokens(documents, 9).tolist() == [2, 5, 7, 9]
    for given, count in (([], 3), (documents, 0)):
        with pytest.raises(ShortstackError, match="no vocabulary"):
            frequent_tokens(given, count)
