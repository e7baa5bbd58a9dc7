"""Decode steps over fixed slots compute what the plain session does; on a card, captured too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shortstack.errors import ShortstackError
from shortstack.runtimes import open_session
from shortstack.runtimes.pytorch import PyTorchSession
from shortstack.runtimes.pytorch_graph import ALIGNMENT, GraphSession

ROWS = np.array([[1, 50, 60, 70, 300, 20, 19], [45, 200, 210, 77, 12, 9, 8]])
ROUNDING = 2e-4
"""Of float32, in logits of a size of some ten: attention adds up in another order."""


def plain(path: Path, batch: int = 1, **more: Any) -> PyTorchSession:
    return PyTorchSession(path, threads=1, context_tokens=40, batch=batch, **more)


def stepped(path: Path, batch: int = 1, context_tokens: int = 40) -> GraphSession:
    return GraphSession(path, threads=1, context_tokens=context_tokens, batch=batch, capture=False)


def greedy(session: PyTorchSession, prompt: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """n tokens behind the prompt, and the logits that each was chosen from."""
    logits = [session.prefill(prompt)]
    for _ in range(n - 1):
        logits.append(session.decode(int(logits[-1].argmax())))
    return [int(row.argmax()) for row in logits], np.array(logits)


def test_steps_give_the_plain_sessions_tokens_and_logits(tiny: Path) -> None:
    with plain(tiny) as one, stepped(tiny) as other:
        for prompt in (ROWS[0].tolist(), ROWS[1, :2].tolist()):  # the second in used slots
            tokens, logits = greedy(one, prompt, 30)
            same, close = greedy(other, prompt, 30)
            assert same == tokens
            np.testing.assert_allclose(close, logits, atol=ROUNDING)


def test_rows_step_side_by_side_behind_a_prompt_at_depth(tiny: Path) -> None:
    with plain(tiny, batch=2) as one, stepped(tiny, batch=2) as other:
        for session in (one, other):
            session.prefill_rows(ROWS[:, :3])
            session.extend_rows(ROWS[:, 3:5])
        for at in (5, 6):
            np.testing.assert_allclose(
                other.extend_rows(ROWS[:, at : at + 1]),
                one.extend_rows(ROWS[:, at : at + 1]),
                atol=ROUNDING,
            )


def test_a_prompt_has_the_very_logits_of_the_plain_session(tiny: Path) -> None:
    with plain(tiny) as one, stepped(tiny) as other:
        for _ in range(2):
            np.testing.assert_array_equal(
                other.prefill(ROWS[0].tolist(), all_logits=True),
                one.prefill(ROWS[0].tolist(), all_logits=True),
            )
            other.decode(5)


def test_a_sequence_goes_back_and_on(tiny: Path) -> None:
    with plain(tiny) as one, stepped(tiny) as other:
        expected = one.prefill(ROWS[0].tolist(), all_logits=True)
        assert other.resume(0, [1]) is None
        other.prefill([*ROWS[0, :4].tolist(), 400, 401])
        other.decode(402)
        rows = other.resume(4, ROWS[0, 4:6].tolist())
        last = other.decode(int(ROWS[0, 6]))
    assert rows is not None
    np.testing.assert_allclose(rows, expected[4:6], atol=ROUNDING)
    np.testing.assert_allclose(last, expected[6], atol=ROUNDING)


def test_going_back_by_one_token_is_a_step_like_any_other(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energy is counted over turns that begin so: none of their tokens may be run without the
    graph."""
    with plain(tiny) as one, stepped(tiny) as other:
        expected = one.prefill(ROWS[0, :5].tolist())
        other.prefill(ROWS[0, :5].tolist())
        monkeypatch.setattr(PyTorchSession, "_forward", lambda *_: pytest.fail("ran eagerly"))
        rows = other.resume(4, [int(ROWS[0, 4])])
    assert rows is not None
    assert rows.shape == (1, other.vocab_size)
    np.testing.assert_allclose(rows[0], expected, atol=ROUNDING)


def test_what_is_no_number_does_not_outlive_its_sequence(tiny: Path) -> None:
    prompt = ROWS[0].tolist()
    with stepped(tiny) as session:
        session.prefill(prompt)
        fresh = session.decode(7)
        session.prefill(prompt * 2)
        with torch.inference_mode():
            session._cache.layers[0].values[:, :, 12] = float("nan")
        assert np.isnan(session.decode(7)).any()
        session.prefill(prompt)
        np.testing.assert_array_equal(session.decode(7), fresh)


def test_the_context_ends_where_it_was_said_to(tiny: Path) -> None:
    with stepped(tiny, context_tokens=7) as session:
        assert session.info["kv_slots"] == ALIGNMENT
        with pytest.raises(ShortstackError, match="needs a prefill"):
            session.decode(1)
        session.prefill(ROWS[0, :6].tolist())
        session.decode(1)
        with pytest.raises(ShortstackError, match="context of 7 tokens is full"):
            session.decode(1)


def test_a_batch_other_than_the_opened_one_is_refused(tiny: Path) -> None:
    with (
        stepped(tiny, batch=2) as session,
        pytest.raises(ShortstackError, match="opened for 2 sequences, 1 are given"),
    ):
        session.prefill([1, 2])


@pytest.mark.parametrize(
    ("model_type", "more", "context_tokens", "words"),
    [
        ("mistral", {"sliding_window": 8}, 8, None),
        ("mistral", {"sliding_window": 8}, 9, "sees 8 tokens back, the context is 9"),
        ("qwen3", {}, 24, None),
        ("gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 16}, 24, None),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, 24, "layers of attention alone"),
    ],
)
def test_windows_and_other_states_are_right_or_refused(
    tmp_path: Path, model_type: str, more: dict[str, Any], context_tokens: int, words: str | None
) -> None:
    _save(tmp_path, model_type, more)
    if words is not None:
        with pytest.raises(ShortstackError, match=words) as caught:
            stepped(tmp_path, context_tokens=context_tokens)
        assert "\n" not in str(caught.value)
        return
    n = context_tokens - 3
    with plain(tmp_path) as one, stepped(tmp_path, context_tokens=context_tokens) as other:
        tokens, logits = greedy(one, [1, 2, 3], n)
        same, close = greedy(other, [1, 2, 3], n)
    assert same == tokens
    np.testing.assert_allclose(close, logits, atol=ROUNDING)


def test_a_rotation_that_changes_with_the_length_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    _save(tmp_path, "llama", {"rope_scaling": rope})
    with pytest.raises(ShortstackError, match=r"changes with the length \(dynamic\)"):
        stepped(tmp_path)


def _save(folder: Path, model_type: str, more: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_the_cpu_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(ShortstackError, match="cuda_graph=on is for CUDA cards, cpu"):
        open_session(
            Path("none"), "pytorch", threads=1, context_tokens=8, options={"cuda_graph": "on"}
        )
