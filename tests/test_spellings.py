"""A config of either major of transformers gives the same model, whichever is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.zoo import make_model
from transformers import AutoModelForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families import both_spellings
from shortstack.pretrained import config_of
from shortstack.prune import PrunePlan, apply_plan
from shortstack.runtimes import open_session

TOKENS = [(37 * index + 11) % 512 for index in range(48)]
ROTATION = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
)
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FACTORS = {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}

SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 3e4, **LLAMA3}},
        {"rope_theta": 3e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "qwen3": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        {"rope_theta": 3e4, "rope_scaling": None},
    ),
    "gemma3": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3e5, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
            }
        },
        {
            "rope_theta": 3e5,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_local_base_freq": 2e3,
        },
    ),
    "phi4-mini": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 3e4,
                "partial_rotary_factor": 0.5,
                **FACTORS,
            }
        },
        {
            "rope_theta": 3e4,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
    ),
}
"""Model of the zoo -> the same rotation as transformers 5 writes it and as 4.57 does."""


def respell(folder: Path, fields: dict[str, Any]) -> Path:
    """Give the folder's config these fields of a rotation and no other."""
    file = folder / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ROTATION}
    file.write_text(json.dumps({**config, **fields}))
    return folder


def logits(folder: Path) -> NDArray[np.float32]:
    with open_session(folder, "pytorch", threads=1, context_tokens=len(TOKENS)) as session:
        return session.prefill(TOKENS, all_logits=True)


def plain_logits(folder: Path) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.inference_mode():
        found: NDArray[np.float32] = (
            model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
        )
    return found


def distance(found: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    return float(np.abs(found - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_older_fields_are_added_and_nothing_is_taken(name: str) -> None:
    newer, older = SPELLINGS[name]
    kind = {"gemma3": "gemma3_text", "phi4-mini": "phi3"}.get(name, name)
    config = {"model_type": kind, "vocab_size": 7, **newer}
    assert both_spellings(config) == {**config, **older}
    assert both_spellings({"model_type": kind, **older}) == {"model_type": kind, **older}


@pytest.mark.parametrize("name", SPELLINGS)
def test_both_spellings_are_one_model(name: str, tmp_path: Path) -> None:
    newer, older = SPELLINGS[name]
    folder = make_model(name, tmp_path / "model")
    default = logits(folder)
    truth = logits(respell(folder, newer))
    assert distance(truth, default) > 1e-3, "the rotation does not matter here"
    assert distance(logits(respell(folder, older)), truth) < 1e-6


@pytest.mark.parametrize("spelling", [0, 1], ids=["newer", "older"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_plain_transformers_of_either_major_opens_a_pruned_folder_right(
    name: str, spelling: int, tmp_path: Path
) -> None:
    folder = respell(make_model(name, tmp_path / "model"), SPELLINGS[name][spelling])
    original, out = Checkpoint.open(folder), tmp_path / "out"
    out.mkdir()
    pruned = apply_plan(original, PrunePlan(original.n_layers, (1, 4, 6), "explicit"), out)
    assert distance(plain_logits(pruned.path), logits(pruned.path)) < 1e-6
    truth = logits(out)
    for fields in SPELLINGS[name]:
        assert distance(logits(respell(out, fields)), truth) < 1e-6


def test_the_text_tower_of_a_multimodal_config_is_spelled_out_too() -> None:
    newer, older = SPELLINGS["gemma3"]
    tower = {"model_type": "gemma3_text", **newer}
    both = both_spellings({"model_type": "gemma3", "text_config": tower})
    assert both == {"model_type": "gemma3", "text_config": {**tower, **older}}


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo3"])
def test_a_rotation_without_an_older_spelling_is_refused_and_never_half_written(kind: str) -> None:
    config = {
        "model_type": kind,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        },
    }
    assert both_spellings(config) == config
    with pytest.raises(ShortstackError, match="transformers 4 cannot give the sliding layers"):
        both_spellings(config, strict=True)


def test_olmo_3_has_one_base_in_the_older_spelling() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    both = {"full_attention": rope, "sliding_attention": rope}
    config = {"model_type": "olmo3", "rope_parameters": both}
    assert both_spellings(config) == {**config, "rope_theta": 5e5, "rope_scaling": None}
    config["rope_parameters"] = {**both, "sliding_attention": {**rope, "rope_theta": 1e4}}
    with pytest.raises(ShortstackError, match="sliding layers"):
        both_spellings(config, strict=True)


def test_an_unknown_model_type_is_left_to_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    assert config_of(tmp_path).n_layer == 3


def test_capped_attention_scores_count(tmp_path: Path) -> None:
    """transformers 4.57 drops the cap of Gemma 2 in the attention that it chooses by itself."""
    folder = make_model("gemma2", tmp_path / "model")
    weak = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 0.05}))
    assert distance(logits(folder), weak) > 1e-2
