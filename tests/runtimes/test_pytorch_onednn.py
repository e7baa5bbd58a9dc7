"""Matrices in oneDNN's order multiply alike, and the model is as it was afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.early_exits import opened, prompts_of
from torch import nn

from shortstack.errors import ShortstackError
from shortstack.runtimes.pytorch_drafters import SkipDrafter
from shortstack.runtimes.pytorch_onednn import reordered
from shortstack.runtimes.pytorch_speculate import greedy, speculate


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_products_are_those_of_pytorch(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, given = nn.Linear(48, 80, bias=bias), torch.randn(1, rows, 48)
    with torch.inference_mode():
        wanted = layer(given)
        with reordered(layer):
            assert "forward" in layer.__dict__
            torch.testing.assert_close(layer(given), wanted, atol=1e-5, rtol=1e-5)
        assert "forward" not in layer.__dict__
        assert torch.equal(layer(given), wanted)


def test_a_model_says_the_same_tokens(tiny: Path) -> None:
    model, prompt = opened(tiny), prompts_of(tiny, 1)[0].tokens
    wanted = greedy(model, prompt, 20, "cpu")
    drafter = SkipDrafter(model, (2, 3), vocabulary=range(0, model.vocab_size, 2))
    with reordered(*drafter.modules):
        assert greedy(model, prompt, 20, "cpu") == wanted
        assert speculate(drafter, prompt, 20, 2, "cpu").tokens == wanted


def test_an_error_inside_leaves_layers_as_they_were() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(KeyError), reordered(layer):
        raise KeyError
    assert "forward" not in layer.__dict__


def test_other_types_are_refused() -> None:
    with pytest.raises(ShortstackError, match=r"torch\.bfloat16 on cpu are not reordered"):
        reordered(nn.Linear(4, 4, dtype=torch.bfloat16)).__enter__()


def test_without_onednn_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ShortstackError, match="has no oneDNN"):
        reordered(nn.Linear(4, 4)).__enter__()
