"""Tokens that leave early: what the cache holds behind an exit, and what it costs to have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import zoo
from tests.early_exits import opened

from shortstack.checkpoint import Checkpoint
from shortstack.early_exit.rule import ANSWERS, STATE, VOCABULARY, Rule
from shortstack.errors import ShortstackError
from shortstack.prune.early_exit.classifier import top_rule
from shortstack.prune.early_exit.tokens import fit_tokens, token_states
from shortstack.runtimes.pytorch_early_tokens import EarlyTokenSession

IDS = [3, 41, 17, 8, 99, 23, 7, 56, 12, 30]


def always(after: int, width: int) -> Rule:
    """Every token leaves after the same number of layers."""
    return Rule(
        (after,), STATE, np.zeros((1, width), np.float32), np.ones(1, np.float32), threshold=0.0
    )


def of(folder: Path, rule: Rule) -> Rule:
    """The rule as if it had been fitted to the model in `folder`."""
    return dataclasses.replace(rule, model_sha256=Checkpoint.open(folder).sha256)


def never(after: int, width: int) -> Rule:
    return dataclasses.replace(always(after, width), threshold=2.0)


@pytest.fixture
def session(tiny: Path) -> Iterator[EarlyTokenSession]:
    with EarlyTokenSession(tiny, of(tiny, always(3, 64)), threads=1, context_tokens=64) as opened:
        yield opened


def test_the_cache_holds_what_the_exit_state_gives(tiny: Path, session: EarlyTokenSession) -> None:
    """By hand: keys and values of layer 4 from the state after 3 layers, rotated as transformers
    rotates them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    session.prefill(IDS[:4])
    session.decode(IDS[4])
    model = opened(tiny)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([IDS[:5]]), output_hidden_states=True)
        layer = model.model.layers[4]
        states = layer.input_layernorm(out.hidden_states[3][:, 4:])
        shape = (1, 1, -1, layer.self_attn.head_dim)
        keys = layer.self_attn.k_proj(states).view(shape).transpose(1, 2)
        values = layer.self_attn.v_proj(states).view(shape).transpose(1, 2)
        cos, sin = model.model.rotary_emb(states, torch.tensor([[4]]))
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    slot = session._cache.layers[4]
    assert slot.keys.shape[-2] == 5
    assert torch.allclose(slot.keys[:, :, 4:], keys, atol=1e-5)
    assert torch.allclose(slot.values[:, :, 4:], values, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "olmo2", "qwen3", "granite"])
def test_the_first_exit_is_the_head_on_that_state(name: str, tmp_path: Path) -> None:
    folder = zoo.make_model(name, tmp_path / name)
    with EarlyTokenSession(
        folder, of(folder, always(3, 64)), threads=1, context_tokens=64
    ) as session:
        session.prefill(IDS[:4])
        logits = session.decode(IDS[4])
        assert (session.layers_run, session.steps) == (3, 1)
        assert {slot.get_seq_length() for slot in session._cache.layers} == {5}
    model = opened(folder)
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([IDS[:5]]), output_hidden_states=True).hidden_states
        shaped = model.get_output_embeddings()(model.get_decoder().norm(states[3][:, -1]))[0]
    config = model.config
    shaped = shaped / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    shaped = (shaped / cap).tanh() * cap if cap else shaped
    assert np.allclose(logits, shaped.numpy(), atol=1e-4)


def test_who_never_leaves_decodes_as_the_plain_session(tiny: Path) -> None:
    model = opened(tiny)
    with EarlyTokenSession(tiny, of(tiny, never(3, 64)), threads=1, context_tokens=64) as session:
        session.prefill(IDS[:1])
        found = np.stack([session.decode(token) for token in IDS[1:]])
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0, 1:].numpy()
    assert np.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(("fill", "held"), [("state", 5), ("zeros", 5), ("none", 4)])
def test_fills_differ_in_what_later_layers_see(tiny: Path, fill: str, held: int) -> None:
    with EarlyTokenSession(
        tiny, of(tiny, always(3, 64)), fill=fill, threads=1, context_tokens=64
    ) as session:
        session.prefill(IDS[:4])
        session.decode(IDS[4])
        slot = session._cache.layers[5]
        assert slot.get_seq_length() == held
        assert (slot.keys[:, :, 4:] == 0).all() == (fill != "state")
        assert session.decode(IDS[5]).shape == (512,)


def test_a_fit_on_text_leaves_where_the_lens_agrees(tiny: Path) -> None:
    pytest.importorskip("sklearn")
    model = opened(tiny)
    draw = np.random.default_rng(0)
    windows = draw.integers(0, 512, size=(8, 24)).tolist()
    layers = (2, 4)
    fit, validation = (token_states(model, part, layers) for part in (windows[:4], windows[4:]))
    assert fit[0].shape == (4 * 23, 2, 64)
    rule = fit_tokens(model, fit, validation, layers, max_changed=0.5, model_sha256="")
    assert rule.check == STATE
    assert rule.facts["validation"]["changed"] <= 0.5
    assert rule.facts["validation"]["saved"] > 0


def test_rules_of_questions_are_refused(tiny: Path) -> None:
    weights, bias = top_rule(1, 3)
    with pytest.raises(ShortstackError, match="is for questions"):
        EarlyTokenSession(
            tiny, Rule((2,), ANSWERS, weights, bias, 0.5), threads=1, context_tokens=8
        )
    with pytest.raises(ShortstackError, match="unknown fill"):
        EarlyTokenSession(tiny, always(2, 64), fill="guess", threads=1, context_tokens=8)


@pytest.mark.parametrize("sha256", ["", "0" * 64])
def test_a_rule_of_another_model_is_refused(tiny: Path, sha256: str) -> None:
    rule = dataclasses.replace(always(3, 64), model_sha256=sha256)
    with pytest.raises(ShortstackError, match="was fitted to another model"):
        EarlyTokenSession(tiny, rule, threads=1, context_tokens=8)


def test_the_whole_heads_probabilities_may_decide(tiny: Path) -> None:
    weights, bias = top_rule(1, 3)
    rule = Rule((3,), VOCABULARY, weights, bias, threshold=0.0)
    with EarlyTokenSession(tiny, of(tiny, rule), threads=1, context_tokens=16) as session:
        session.prefill(IDS[:4])
        session.decode(IDS[4])
        assert session.layers_run == 3
