"""The PyTorch scorer: batches, padding and shared beginnings change no number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.zoo import ZOO, make_model

from shortstack.errors import ShortstackError
from shortstack.evaluate.scorer import Pair, Scored
from shortstack.evaluate.torch_scorer import TorchScorer
from shortstack.pretrained import load


def pairs_of(seed: int = 0, n_questions: int = 7) -> list[Pair]:
    """Questions of 2 to 5 choices that share a beginning, of very different lengths."""
    draw = np.random.default_rng(seed)
    found: list[Pair] = []
    for question in range(n_questions):
        context = draw.integers(3, 512, 4 + 9 * question).tolist()
        for choice in range(2 + question % 4):
            found.append((context, draw.integers(3, 512, 1 + choice).tolist()))
    return found


def by_hand(folder: Path, pairs: list[Pair]) -> list[Scored]:
    """One forward of the whole model a pair, no batch, no padding, no cache."""
    model = load(folder, torch.float32)
    found = []
    for context, continuation in pairs:
        with torch.inference_mode():
            logits = model(torch.tensor([context + continuation])).logits[0].float()
        rows = logits.log_softmax(-1)[len(context) - 1 : -1]
        targets = torch.tensor(continuation)
        nats = -rows[torch.arange(len(targets)), targets].double().sum().item()
        found.append(Scored(nats, len(targets), bool((rows.argmax(-1) == targets).all())))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_and_shared_beginnings_give_what_one_row_at_a_time_gives(
    tiny: Path, batch_tokens: int
) -> None:
    pairs = pairs_of()
    with TorchScorer(tiny, batch_tokens=batch_tokens) as scorer:
        found = scorer.log_likelihoods(pairs)
    wanted = by_hand(tiny, pairs)
    assert [one.n_tokens for one in found] == [one.n_tokens for one in wanted]
    assert [one.greedy for one in found] == [one.greedy for one in wanted]
    np.testing.assert_allclose(
        [one.sum_nats for one in found], [one.sum_nats for one in wanted], atol=2e-4
    )


def test_a_shared_beginning_is_run_once(tiny: Path) -> None:
    model = load(tiny, torch.float32)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, result: seen.append(given[0].numel())
    )
    context = list(range(10, 110))
    with TorchScorer(model) as scorer:
        scorer.log_likelihoods([(context, [choice]) for choice in range(20, 28)])
    assert sum(seen) == 99 + 8


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_family_is_scored_as_transformers_computes_it(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path / name)
    pairs = pairs_of(1)
    with TorchScorer(tmp_path / name) as scorer:
        found = scorer.log_likelihoods(pairs)
    wanted = by_hand(tmp_path / name, pairs)
    np.testing.assert_allclose(
        [one.sum_nats for one in found], [one.sum_nats for one in wanted], atol=2e-4
    )


def test_windows_are_scored_on_all_but_their_first_token(tiny: Path) -> None:
    window = list(range(30, 62))
    with TorchScorer(tiny) as scorer:
        (found,) = scorer.nats([window])
        rows = scorer.log_probs(window)
    assert rows.shape == (32, 512)
    np.testing.assert_allclose(np.exp(rows).sum(-1), 1, atol=1e-5)
    assert found.n_tokens == 31
    by_rows = -rows[np.arange(31), window[1:]].sum(dtype=np.float64)
    assert found.sum_nats == pytest.approx(by_rows, abs=1e-3)


def test_a_context_that_is_too_long_loses_its_left_end(tiny: Path) -> None:
    context = [3 + n % 500 for n in range(60)]
    with TorchScorer(tiny, max_tokens=32) as scorer:
        (cut,) = scorer.log_likelihoods([(context, [7, 8])])
        (alone,) = scorer.log_likelihoods([(context[-31:], [7, 8])])
    assert cut == alone


def test_generation_takes_the_likeliest_token_until_it_is_told_to_stop(tiny: Path) -> None:
    prompts = [[5, 9, 30, 41], list(range(60, 70)), [5, 9, 30], list(range(100, 140))]
    with TorchScorer(tiny) as scorer:
        found = scorer.generate(prompts, 6, lambda ids: False)
        stopped = scorer.generate(prompts, 6, lambda ids: len(ids) == 2)
        for prompt, ids in zip(prompts, found, strict=True):
            row = scorer.log_probs(prompt + ids)
            assert ids == row[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert [ids[:2] for ids in found] == stopped


def test_a_model_in_memory_stays_as_it_was(tiny: Path) -> None:
    model = load(tiny, torch.float32).train()
    with TorchScorer(model) as scorer:
        found = scorer.log_likelihoods(pairs_of())
    with TorchScorer(tiny) as scorer:
        assert scorer.log_likelihoods(pairs_of()) == found
    assert model.training


def test_a_batch_that_memory_does_not_hold_is_halved(tiny: Path) -> None:
    model = load(tiny, torch.float32)

    def refuse(module: object, given: tuple[torch.Tensor]) -> None:
        if given[0].shape[0] > 4:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    model.get_input_embeddings().register_forward_pre_hook(refuse)
    # choices that share nothing: each is a group of its own
    pairs: list[Pair] = [([3 + n, 9, 11 + n], [7, 8]) for n in range(20)]
    with TorchScorer(tiny) as scorer:
        wanted = scorer.log_likelihoods(pairs)
    with TorchScorer(model) as scorer:
        found = scorer.log_likelihoods(pairs)
        assert scorer.info["batches_halved"] == 1 + 2 + 4
        with pytest.raises(ShortstackError, match="out of memory on cpu with one question"):
            scorer.log_likelihoods([([*range(10, 60)], [70 + n]) for n in range(5)])
    np.testing.assert_allclose(
        [one.sum_nats for one in found], [one.sum_nats for one in wanted], atol=1e-4
    )


def test_an_unknown_dtype_is_refused(tiny: Path) -> None:
    with pytest.raises(ShortstackError, match="unknown dtype 'float8'"):
        TorchScorer(tiny, dtype="float8")
