"""Small random models of every supported family, with and without tying and biases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.tokens import Encoder

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-untied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
}


@pytest.fixture
def make_model(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """Write a random model folder; tokenizer files are the tiny model's."""

    def make(variant: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
        config_class, model_class, extra = VARIANTS[variant]
        torch.manual_seed(0)
        model = model_class(config_class(**SHAPE, **extra))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        folder = tmp_path / variant
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(tiny / name, folder / name)
        return folder

    return make


@pytest.fixture(params=sorted(VARIANTS))
def any_model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    """One folder for each family variant."""
    return make_model(request.param)


@pytest.fixture
def opened(tiny: Path) -> tuple[Any, Encoder]:
    """The trained tiny model in transformers, and its tokenizer."""
    return load(tiny, torch.float32), Encoder(Checkpoint.open(tiny))
