"""Layers for drafts: the search ends where no exchange of one layer is better."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests.early_exits import opened

from shortstack.errors import ShortstackError
from shortstack.prune.early_exit.skip import choose_skip

WINDOWS = [[3, 41, 17, 8, 99, 23, 7, 56, 12, 30], [5, 6, 200, 301, 44, 9, 9, 71, 80, 2]]


def by_hand(folder: Path, skip: tuple[int, ...]) -> float:
    """Agreement of a model whose skipped layers were taken out of it."""
    whole, cut = opened(folder), opened(folder)
    kept = [layer for at, layer in enumerate(cut.model.layers) if at not in skip]
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    cut.model.layers = torch.nn.ModuleList(kept)
    with torch.inference_mode():
        same = [
            (whole(ids).logits.argmax(-1) == cut(ids, use_cache=False).logits.argmax(-1)).float()
            for ids in map(torch.tensor, ([window] for window in WINDOWS))
        ]
    return float(torch.cat(same).mean())


def test_no_exchange_and_no_run_agrees_more(tiny: Path) -> None:
    pairs = {pair: by_hand(tiny, pair) for pair in itertools.combinations(range(1, 5), 2)}
    found = choose_skip(opened(tiny), WINDOWS, 2, trials=50)
    first, second = found.skip
    assert found.agreement == pytest.approx(pairs[first, second])
    for pair, agreement in pairs.items():
        if pair[1] == pair[0] + 1 or set(pair) & set(found.skip):
            assert found.agreement >= agreement - 1e-6
    assert len(set(pairs.values())) > 1


@pytest.mark.parametrize("count", [0, 5])
def test_too_many_layers_are_refused(tiny: Path, count: int) -> None:
    with pytest.raises(ShortstackError, match="name 1 to 4"):
        choose_skip(opened(tiny), WINDOWS, count)
