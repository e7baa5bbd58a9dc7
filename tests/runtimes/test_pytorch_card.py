"""The PyTorch runtime's options on a real NVIDIA card. Skips, and says why, where there is none."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtimes.test_pytorch_awq import dequantized, needed

from shortstack.errors import ShortstackError
from shortstack.runtimes import open_session
from shortstack.runtimes.pytorch import PyTorchSession
from shortstack.runtimes.pytorch_awq import quantized
from shortstack.runtimes.pytorch_graph import GraphSession

PROMPT = [1, 50, 60, 70, 300, 20, 19]
N = 40
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this PyTorch sees no card: CUDA graphs were not tried"
)
ROUNDING = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.06}
"""In logits: other attention kernels add up in another order."""


def session_of(path: Path, batch: int = 1, **options: str) -> PyTorchSession:
    made = open_session(
        path,
        "pytorch",
        threads=1,
        context_tokens=len(PROMPT) + N,
        device="cuda:0",
        batch=batch,
        options=options,
    )
    assert isinstance(made, PyTorchSession)
    return made


def forced(session: PyTorchSession, tokens: list[int]) -> np.ndarray:
    """Logits behind the prompt and behind each of `tokens`."""
    rows = [session.prefill(PROMPT)]
    rows += [session.decode(token) for token in tokens]
    return np.array(rows)


def greedy(session: PyTorchSession) -> list[int]:
    chosen = [int(session.prefill(PROMPT).argmax())]
    while len(chosen) < N:
        chosen.append(int(session.decode(chosen[-1]).argmax()))
    return chosen


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_replays_are_the_plain_sessions_steps(tiny: Path, dtype: str) -> None:
    with session_of(tiny, dtype=dtype) as plain:
        tokens = greedy(plain)
        expected = forced(plain, tokens)
    with session_of(tiny, dtype=dtype, cuda_graph="on") as graph:
        assert graph.info["cuda_graph"] == "on"
        for _ in range(2):  # the second time in slots that were used
            found = forced(graph, tokens)
            np.testing.assert_allclose(found, expected, atol=ROUNDING[dtype])
        if dtype == "float32":
            assert greedy(graph) == tokens


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_replays_are_the_step_without_a_graph(tiny: Path, dtype: str) -> None:
    given = {"threads": 1, "context_tokens": len(PROMPT) + N, "device": "cuda:0", "dtype": dtype}
    with GraphSession(tiny, capture=False, **given) as eager:  # type: ignore[arg-type]  # of two kinds
        tokens = greedy(eager)
        expected = forced(eager, tokens)
    with GraphSession(tiny, **given) as graph:  # type: ignore[arg-type]  # the same
        assert greedy(graph) == tokens
        np.testing.assert_allclose(forced(graph, tokens), expected, atol=1e-4)


def test_a_batch_behind_a_prompt_at_depth_is_replayed(tiny: Path) -> None:
    rows = np.array([[5, 6, 7, 8, 9, 10], [300, 20, 19, 45, 200, 210], [7, 7, 8, 400, 3, 2]])
    seen = []
    for options in ({}, {"cuda_graph": "on"}):
        with session_of(tiny, batch=3, **options) as session:
            session.prefill_rows(rows[:, :2])
            session.extend_rows(rows[:, 2:4])
            seen.append([session.extend_rows(rows[:, at : at + 1]) for at in (4, 5)])
    np.testing.assert_allclose(seen[1], seen[0], atol=ROUNDING["float32"])


def test_what_asks_the_device_is_refused_in_one_line() -> None:
    from shortstack.runtimes.pytorch_graph import captured

    one = torch.ones(1, device="cuda:0")
    with pytest.raises(ShortstackError, match="cannot be captured") as caught:
        captured(lambda: one * float(one.item()), torch.device("cuda:0"))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("default")  # the libraries use what is deprecated
@pytest.mark.parametrize(
    ("word", "dtype", "graph"),
    [
        ("bnb-int8", "float16", "off"),
        ("bnb-nf4", "float16", "off"),
        ("bnb-nf4", "float16", "on"),
        ("torchao-int4", "bfloat16", "off"),
        ("torchao-int4", "bfloat16", "on"),
    ],
)
def test_quantized_weights_compute_on_the_card(
    tmp_path: Path, word: str, dtype: str, graph: str
) -> None:
    package = "torchao" if word.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'shortstack[quantize]'")
    _save_wide(tmp_path)
    with session_of(tmp_path, dtype=dtype) as session:
        whole = forced(session, PROMPT)
    with session_of(tmp_path, dtype=dtype, quantize=word, cuda_graph=graph) as session:
        found, info = forced(session, PROMPT), session.info
    assert info["unquantized_layers"] == ["lm_head"]
    assert info["quantized_layers"] == 7 * 2
    assert info["weight_bytes_per_token"] < info["weight_bytes"]
    assert np.isfinite(found).all()
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, whole, strict=True)]
    assert min(alike) > 0.9
    assert not np.array_equal(found, whole)


@pytest.mark.parametrize("graph", ["off", "on"])
def test_awq_weights_compute_what_their_codes_say(
    tmp_path: Path, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the plain session on float16 weights that the same codes were turned back to."""
    from shortstack.runtimes import pytorch_awq

    needed()
    _save_wide(tmp_path / "whole")
    _save_dequantized(tmp_path / "whole", tmp_path / "rounded")
    with session_of(tmp_path / "whole", dtype="float16") as session:
        whole = forced(session, PROMPT)
    with session_of(tmp_path / "rounded", dtype="float16") as session:
        expected = forced(session, PROMPT)
    with awq_session_of(tmp_path / "whole", cuda_graph=graph) as session:
        found, info = forced(session, PROMPT), session.info
        # the route for many rows, for the prompt alone: steps of a graph are what was captured
        monkeypatch.setattr(pytorch_awq, "MANY_ROWS", len(PROMPT))
        many = session.prefill(PROMPT)
    assert info["unquantized_layers"] == ["lm_head"]
    assert info["quantized_layers"] == 7 * 2
    assert info["weight_bytes_per_token"] < info["weight_bytes"]
    np.testing.assert_allclose(found, expected, atol=ROUNDING["float16"])
    np.testing.assert_allclose(many, expected[0], atol=ROUNDING["float16"])
    assert not np.allclose(found, whole, atol=ROUNDING["float16"])  # it was quantized


def test_loading_awq_gives_the_float16_weights_back_to_the_card(tmp_path: Path) -> None:
    needed()
    _save_wide(tmp_path)
    one = torch.ones(2048, 2048, device="cuda:0").half()
    (one @ one).sum().item()  # cuBLAS keeps a workspace from its first product on
    del one
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    with awq_session_of(tmp_path) as session:
        torch.cuda.empty_cache()  # of what the kernels' first products took
        taken = torch.cuda.memory_reserved(0) - before
        n_bytes = session.info["weight_bytes"]
    assert taken < n_bytes + 2**23  # segments of 2 and 20 MiB; float16 takes 34 MB more


def awq_session_of(path: Path, cuda_graph: str = "off") -> PyTorchSession:
    return session_of(path, dtype="float16", quantize="awq-int4", cuda_graph=cuda_graph)


def _save_dequantized(source: Path, folder: Path) -> None:
    """The model whose linear layers but the head are what AWQ's codes say, in float16."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parts = quantized(module.weight.detach())
            module.weight.data = torch.from_numpy(dequantized(parts)).half().contiguous()
    model.save_pretrained(folder)


def _save_wide(folder: Path) -> None:
    """Two random layers as wide as torchao's kernel wants them, the head its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
