from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from shortstack.errors import ShortstackError
from shortstack.prune.per_layer import cut_config

SLIDING, FULL = "sliding_attention", "full_attention"


def families() -> dict[str, PretrainedConfig]:
    """Configs of many families as transformers itself fills them in: 12 layers each."""
    small: dict[str, Any] = {
        "num_hidden_layers": 12,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    }
    made = {
        "llama": {},
        "mistral": {},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 6, "sliding_window": 16},
        "qwen3": {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 16},
        "gemma2": {"head_dim": 8},
        "gemma3_text": {"head_dim": 8},
        "smollm3": {},
        "cohere2": {},
        "olmo3": {},
        "gpt_oss": {"head_dim": 8},
        "llama4_text": {"head_dim": 8},
        "qwen3_next": {},
    }
    return {name: AutoConfig.for_model(name, **small, **extra) for name, extra in made.items()}


@pytest.mark.parametrize("name", sorted(families()))
def test_each_kept_layer_keeps_its_kind(name: str) -> None:
    config = families()[name]
    keep = [0, 1, 2, 3, 4, 5, 7, 8, 10]  # no whole period of any family
    before = config.to_dict()
    after = cut_config(before, 12, keep)
    reread = type(config).from_dict(after)
    assert reread.num_hidden_layers == 9
    for field in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if getattr(config, field, None) is not None:
            assert getattr(reread, field) == [getattr(config, field)[index] for index in keep]
    if getattr(config, "moe_layers", None):
        assert [keep[index] for index in reread.moe_layers] == [
            index for index in config.moe_layers if index in keep
        ]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("layer_types", [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL], [SLIDING, FULL, FULL]),
        ("no_rope_layers", [1, 1, 0, 1, 1, 0], [1, 0, 0]),
        ("layers_block_type", list("mmammm"), ["m", "a", "m"]),
        ("hybrid_override_pattern", "M-*M-*", "M**"),
        ("activation_sparsity_pattern", [0.9, 0.9, 0.5, 0.0, 0.0, 0.1], [0.9, 0.5, 0.1]),
        ("intermediate_size", [8, 8, 16, 8, 8, 32], [8, 16, 32]),
        ("mlp_only_layers", [0, 1, 5], [0, 2]),
        ("attn_layer_indices", [2, 3], [1]),
        ("moe_layers", [], []),
        ("cross_attention_layers", [-1], [2]),
        ("max_window_layers", 6, 3),
        ("max_window_layers", 28, 3),
        ("max_window_layers", 3, 2),
        ("first_k_dense_replace", 1, 1),
        ("first_k_dense_replace", 2, 1),
        ("num_kv_shared_layers", 1, 1),
        ("no_rope_layers", None, None),
        ("eos_token_id", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ("sliding_window", 4096, 4096),
        ("n_layer", 6, 3),
    ],
)
def test_a_field_follows_the_cut(field: str, value: Any, expected: Any) -> None:
    keep = (0, 2, 5) if field != "num_kv_shared_layers" else (3, 4, 5)
    after = cut_config({"num_hidden_layers": 6, field: value}, 6, keep)
    assert after == {"num_hidden_layers": 3, field: expected}


@pytest.mark.parametrize(
    ("field", "value", "whole", "broken"),
    [
        ("sliding_window_pattern", 3, (3, 4, 5), (2, 3, 4)),
        ("sliding_window_pattern", "LLG", (0, 1, 2), (0, 1, 3)),
        ("no_rope_layer_interval", 2, (2, 3, 4, 5), (0, 2, 4)),
        ("full_attention_interval", 3, (0, 1, 2), (1, 2, 3)),
        ("decoder_sparse_step", 2, (0, 1), (1, 2)),
        ("attn_layer_period", 3, (3, 4, 5), (1, 2, 4)),
        ("block_types", ["r", "r", "a"], (0, 1, 2), (0, 2)),
    ],
)
def test_a_bare_period_allows_only_cuts_that_keep_its_rhythm(
    field: str, value: Any, whole: tuple[int, ...], broken: tuple[int, ...]
) -> None:
    config = {"num_hidden_layers": 6, field: value}
    assert cut_config(config, 6, whole)[field] == value
    with pytest.raises(ShortstackError, match=f"'{field}' makes layers differ with a period"):
        cut_config(config, 6, broken)


def test_an_explicit_list_rules_and_a_broken_period_goes() -> None:
    config = {
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
    }
    after = cut_config(config, 6, (0, 2, 5))
    assert after == {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}
    assert cut_config(config, 6, (0, 1, 2))["sliding_window_pattern"] == 3


def test_a_period_of_one_allows_every_cut() -> None:
    assert cut_config({"num_hidden_layers": 3, "moe_layer_freq": 1}, 3, (1,))["moe_layer_freq"] == 1


def test_a_shared_cache_keeps_its_source() -> None:
    config = {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    }
    assert cut_config(config, 6, (2, 3, 4))["num_kv_shared_layers"] == 1
    with pytest.raises(ShortstackError, match="layer 4 reuses the cache of layer 2"):
        cut_config(config, 6, (0, 1, 3, 4, 5))


def test_the_decoder_of_a_multimodal_config_is_cut_and_its_eyes_are_not() -> None:
    config = {
        "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
        "vision_config": {"num_hidden_layers": 3, "sizes": [1, 2, 3]},
    }
    after = cut_config(config, 3, (0, 2))
    assert after["text_config"] == {"num_hidden_layers": 2, "layer_types": ["a", "c"]}
    assert after["vision_config"] == config["vision_config"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"per_layer_magic": [1, 2, 3]}, "'per_layer_magic' has 3 entries"),
        ({"layer_types": ["a", "b"]}, "'layer_types' has 2 entries for 3 layers"),
        ({"scale_depth": 1.4}, "'scale_depth' scales every layer"),
        ({"linear_attn_config": {"full_attn_layers": [4]}}, "'linear_attn_config'"),
        ({"num_hidden_layers": 4}, "the plan is for 3 layers, the config has 4"),
    ],
)
def test_what_cannot_follow_a_cut_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ShortstackError, match=words):
        cut_config({"num_hidden_layers": 3, **fields}, 3, (0, 2))
