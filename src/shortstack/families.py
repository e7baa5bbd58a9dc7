"""What a model family looks like, as frozen data: tensor names, shapes, GGUF names.

Intake (GGUF to folder), surgery (folder to folder) and export (folder to GGUF) read the same
table, so a family is right everywhere or nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shortstack.errors import ShortstackError, one_line

REFUSED = {
    "mixture-of-experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "state-space or hybrid": ("ssm_cfg", "mamba_d_state", "layers_block_type", "attn_layer_period"),
}
"""Config fields that betray a kind of model we refuse by name."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a layer or of the whole model.

    `shape` uses the symbols of `dims`; `rope_heads` names the head count whose rows GGUF stores
    in interleaved order (llama.cpp rotates adjacent pairs, transformers rotates halves).
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    rope_heads: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """A decoder-only family whose layers are all alike."""

    model_type: str
    architecture: str
    gguf_arch: str
    layer_prefix: str
    layer: tuple[TensorRule, ...]
    outer: tuple[TensorRule, ...]
    head: TensorRule

    def layer_name(self, index: int, rule: TensorRule) -> str:
        return self.layer_prefix.format(i=index) + rule.hf


def _attention_and_mlp() -> tuple[TensorRule, ...]:
    weight, bias = ".weight", ".bias"
    rules = [
        TensorRule("input_layernorm.weight", "attn_norm.weight", ("d",)),
        TensorRule("post_attention_layernorm.weight", "ffn_norm.weight", ("d",)),
    ]
    for hf, gguf, rows, columns, rope in (
        ("self_attn.q_proj", "attn_q", "q", "d", "heads"),
        ("self_attn.k_proj", "attn_k", "kv", "d", "kv_heads"),
        ("self_attn.v_proj", "attn_v", "kv", "d", None),
        ("self_attn.o_proj", "attn_output", "d", "q", None),
        ("mlp.gate_proj", "ffn_gate", "ff", "d", None),
        ("mlp.up_proj", "ffn_up", "ff", "d", None),
        ("mlp.down_proj", "ffn_down", "d", "ff", None),
    ):
        rules.append(TensorRule(hf + weight, gguf + weight, (rows, columns), rope))
        rules.append(TensorRule(hf + bias, gguf + bias, (rows,), rope, optional=True))
    return tuple(rules)


def _llama_like(model_type: str, architecture: str) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        gguf_arch="llama",
        layer_prefix="model.layers.{i}.",
        layer=_attention_and_mlp(),
        outer=(
            TensorRule("model.embed_tokens.weight", "token_embd.weight", ("vocab", "d")),
            TensorRule("model.norm.weight", "output_norm.weight", ("d",)),
        ),
        head=TensorRule("lm_head.weight", "output.weight", ("vocab", "d")),
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("llama", "LlamaForCausalLM"),
    "mistral": _llama_like("mistral", "MistralForCausalLM"),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family of a config. Raises ShortstackError for one that is not in the table."""
    model_type = config.get("model_type")
    for kind, fields in REFUSED.items():
        found = [field for field in fields if config.get(field)]
        if found:
            raise ShortstackError(
                f"model type {model_type!r} is a {kind} model (config has {found[0]!r}); "
                "shortstack cuts dense transformers only. Choose a dense model."
            )
    try:
        return FAMILIES[str(model_type)]
    except KeyError:
        raise ShortstackError(
            f"unknown architecture: model type {model_type!r} is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        ) from None


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes behind the symbols of TensorRule.shape. Raises ShortstackError for a missing field."""
    try:
        d, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or d // heads)
        return {
            "layers": int(config["num_hidden_layers"]),
            "d": d,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "q": heads * head_dim,
            "kv": kv_heads * head_dim,
            "ff": int(config["intermediate_size"]),
            "vocab": int(config["vocab_size"]),
        }
    except KeyError as missing:
        raise ShortstackError(
            f"config.json has no field {missing}; it is needed to check the tensors. "
            "Download the folder again."
        ) from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ShortstackError(
            f"config.json has a size that is no number: {one_line(str(error))}. "
            "Download the folder again."
        ) from None


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """How many tokens every runtime can run and agree on; None if the config does not say.

    A sliding window ends it: llama.cpp's llama architecture and onnxruntime-genai's builder
    attend to everything, so beyond the window they compute another model.
    """
    limits = [config.get("max_position_embeddings"), config.get("sliding_window")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def window_note(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say of an artifact whose context a sliding window shortens."""
    context, longest = context_tokens(config), config.get("max_position_embeddings")
    if context is None or context == longest:
        return ()
    return (
        f"context_length is {context}, the sliding window, not {longest}: there it has no window",
    )


def expected_tensors(
    family: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, TensorRule, tuple[int, ...], int | None]]:
    """Yield (name, rule, shape, layer or None) for every tensor the family may hold."""
    sizes = dims(config)
    for rule in (*family.outer, family.head):
        yield rule.hf, rule, tuple(sizes[s] for s in rule.shape), None
    for index in range(sizes["layers"]):
        for rule in family.layer:
            name = family.layer_name(index, rule)
            yield name, rule, tuple(sizes[s] for s in rule.shape), index


ROPE_TYPES = ("default", "linear", "llama3")
"""Rotations that every exporter gets right. YaRN comes out of onnxruntime-genai's builder wrong."""


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotation settings, from transformers 5's `rope_parameters` or the older two fields."""
    given = config.get("rope_parameters")
    if given is None:
        given = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    try:
        kind = given.get("rope_type") or given.get("type") or "default"
        theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    except (AttributeError, TypeError, ValueError):
        raise ShortstackError(
            f"config.json has rotation settings that cannot be read: {given!r}. "
            "Download the folder again."
        ) from None
    return {**given, "rope_type": kind, "rope_theta": theta}


def check_rope(config: Mapping[str, Any]) -> None:
    """Raise ShortstackError for a rotation that an exporter would get wrong."""
    kind = rope_parameters(config)["rope_type"]
    if kind not in ROPE_TYPES:
        raise ShortstackError(
            f"rope scaling {kind!r} cannot be exported. Known: {', '.join(ROPE_TYPES)}."
        )
