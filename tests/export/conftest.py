"""Variants of the tiny model, edited tensor by tensor: other families, untied, with biases."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint import Checkpoint
from shortstack.export.verify import kl_divergence, log_softmax
from shortstack.runtimes import open_session

Tensors = dict[str, torch.Tensor]


def write_variant(
    source: Path, folder: Path, edit: Callable[[Tensors], None], **config: Any
) -> Checkpoint:
    """Copy a model folder with other tensors and config fields."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return Checkpoint.open(folder)


def keep(tensors: Tensors) -> None:
    """Change nothing."""


def untie(tensors: Tensors) -> None:
    """Give the head its own tensor, of another scale than the embedding."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.9


def add_biases(tensors: Tensors) -> None:
    """Biases on every projection, large enough to matter."""
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if "_proj.weight" in n]:
        rows = tensors[name].shape[0]
        noise = torch.randn(rows, generator=generator) * 0.1
        tensors[name.replace(".weight", ".bias")] = noise.to(tensors[name].dtype)


def widen_heads(tensors: Tensors) -> None:
    """Heads of 32 instead of 64 / 4: the projections are no longer square."""
    for name in [n for n in tensors if "self_attn" in n]:
        along = 1 if "o_proj" in name else 0
        tensors[name] = torch.cat([tensors[name], tensors[name].flip(0, 1)], along)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, tuple[Callable[[Tensors], None], dict[str, Any]]] = {
    "llama-tied": (keep, {}),
    "llama-untied": (untie, {"tie_word_embeddings": False}),
    "llama-biases": (add_biases, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (keep, {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": (
        keep,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "wide-heads": (widen_heads, {"head_dim": 32}),
    "mistral-untied": (
        untie,
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "tie_word_embeddings": False,
            "sliding_window": None,
        },
    ),
}


@pytest.fixture(scope="session")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.fixture(scope="session")
def tokens(tiny: Path) -> list[int]:
    """96 tokens of licence text."""
    from tokenizers import Tokenizer

    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids[:96]
    return ids


@pytest.fixture(scope="session")
def make_variant(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Write a variant by its name in VARIANTS, or by an edit of tensors and config fields."""

    def make(name: str = "", edit: Callable[[Tensors], None] = keep, **config: Any) -> Checkpoint:
        if name:
            edit, config = VARIANTS[name]
        folder = tmp_path_factory.mktemp("variant") / "model"
        return write_variant(tiny, folder, edit, **config)

    return make


@pytest.fixture(scope="session")
def distance(tokens: list[int]) -> Callable[[Checkpoint, Path, str], tuple[float, float]]:
    """Mean KL to float32 PyTorch of a prefill, and of decoding through the cache."""

    def measure(checkpoint: Checkpoint, path: Path, runtime: str) -> tuple[float, float]:
        size = len(tokens)
        with open_session(checkpoint.path, "pytorch", threads=1, context_tokens=size) as session:
            truth = log_softmax(session.prefill(tokens, all_logits=True))
        with open_session(path, runtime, threads=1, context_tokens=size) as session:
            at_once = log_softmax(session.prefill(tokens, all_logits=True))
            start = size // 2
            rows = [session.prefill(tokens[:start])]
            rows += [session.decode(token) for token in tokens[start:]]
            one_by_one = log_softmax(np.array(rows))
        return (
            float(kl_divergence(truth, at_once).mean()),
            float(kl_divergence(truth[start - 1 :], one_by_one).mean()),
        )

    return measure


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond a size: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
