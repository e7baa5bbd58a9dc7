"""Tiny random models of every supported family: real architectures, small numbers.

Every sliding window is 16 tokens, so that 64 tokens are well beyond it. Depths hold whole periods
of the families whose layers take turns.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TOKENIZER = Path(__file__).parent / "data" / "tiny"
WINDOW = 16
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo: the stem of its classes in transformers, and its config."""

    classes: str
    fields: dict[str, Any] = field(default_factory=dict)
    text: bool = False
    """The config class is NameTextConfig, as where the family has a multimodal sibling."""


def _windowed(pattern: int, n_layers: int) -> list[str]:
    """Every `pattern`-th layer attends to everything, the others to a window."""
    return [
        "full_attention" if (index + 1) % pattern == 0 else "sliding_attention"
        for index in range(n_layers)
    ]


GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 12,
    "head_dim": 32,
    "sliding_window": WINDOW,
    "layer_types": _windowed(6, 12),
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}
"""Spelled as before transformers 5, which reads it, too."""

ZOO: dict[str, Specimen] = {
    "llama": Specimen("Llama", {"tie_word_embeddings": True}),
    "llama-untied": Specimen("Llama", {"tie_word_embeddings": False}),
    "mistral": Specimen("Mistral", {"sliding_window": None}),
    "mistral-window": Specimen("Mistral", {"sliding_window": WINDOW}),
    "smollm3": Specimen("SmolLM3", {"tie_word_embeddings": True, "no_rope_layer_interval": 4}),
    "qwen2": Specimen("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Specimen("Qwen3", {"head_dim": 32}),
    "qwen3-window": Specimen(
        "Qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 4,
        },
    ),
    "gemma": Specimen("Gemma", {"head_dim": 32}),
    "gemma2": Specimen(
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": [*_windowed(2, 8)],
            "query_pre_attn_scalar": 32,
        },
    ),
    "gemma3": Specimen("Gemma3", GEMMA3, text=True),
    "phi3": Specimen("Phi3", {"sliding_window": None}),
    "phi4-mini": Specimen(
        "Phi3",
        {
            "sliding_window": None,
            "tie_word_embeddings": True,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_scaling": LONG_ROPE,
        },
    ),
    "olmo2": Specimen("Olmo2"),
    "olmo3": Specimen(
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": _windowed(4, 8),
            "rope_theta": 500000.0,  # the default of one major of transformers only
        },
    ),
    "granite": Specimen(
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
}
"""Name -> model. `gemma3-multimodal` is made from `gemma3` and a small vision tower."""

MULTIMODAL = "gemma3-multimodal"
NAMES = (*ZOO, MULTIMODAL)


def make_model(name: str, folder: Path) -> Path:
    """Write a Hugging Face folder, float32, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    model = _multimodal() if name == MULTIMODAL else _decoder(ZOO[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            kind = type(model).__name__
            post_norms = ("post_",) if "Olmo" in kind else ()
            _randomize(key, parameter, "Gemma" in kind, post_norms)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    return folder


def _decoder(specimen: Specimen) -> PreTrainedModel:
    config = getattr(transformers, specimen.classes + ("Text" * specimen.text) + "Config")
    made: PreTrainedModel = getattr(transformers, specimen.classes + "ForCausalLM")(
        config(**{**SHAPE, **specimen.fields})
    )
    return made


def _multimodal() -> PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config={**SHAPE, **GEMMA3}, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _randomize(
    name: str, parameter: torch.Tensor, unit_offset: bool, post_norms: tuple[str, ...]
) -> None:
    """Weights that keep the signal's size, norms and biases that matter.

    A sub-block's result is small beside the residual stream, and scores are small, as in a trained
    model: else rounding in a float16 cache is amplified from layer to layer.
    """
    gentle = any(part in name for part in ("q_proj", "k_proj", "qkv_proj"))
    if "norm" in name and name.endswith("weight"):
        after = not unit_offset and any(kind in name for kind in post_norms)
        of_heads = not unit_offset and ("q_norm" in name or "k_norm" in name)
        mean = 0.0 if unit_offset else 0.15 if after else 0.7 if of_heads else 1.0
        parameter.normal_(mean, 0.1 if after else 0.3)
    elif parameter.ndim < 2:
        parameter.normal_(0.0, 0.1)
    elif "embed" in name or "lm_head" in name:
        parameter.normal_(0.0, 0.3)
    else:
        gain = 0.3 if "o_proj" in name or "down_proj" in name else 0.7 if gentle else 1.0
        parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
