"""The families: one entry each. What is not said here is alike in all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a layer or of the whole model.

    `shape` uses the symbols of `dims`; `rope_heads` names the head count whose rows GGUF stores
    in interleaved order (llama.cpp rotates adjacent pairs, transformers rotates halves); `plus`
    is what the family's own norm adds to the stored weight and llama.cpp's does not.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    rope_heads: str | None = None
    optional: bool = False
    plus: float = 0.0

    @property
    def part(self) -> Part | None:
        """The sub-block that the tensor works in; None for norms between them and outer tensors."""
        if self.hf.startswith("self_attn."):
            return "attention"
        return "mlp" if self.hf.startswith("mlp.") else None


@dataclass(frozen=True)
class Family:
    """A decoder-only family whose layers all have the same tensors.

    `outputs` are the projections that write a sub-block's result into the residual stream: zero,
    the sub-block is gone. `full_every`: transformers' own rule where the config has no
    `layer_types` (every n-th layer attends to everything, the others to the window);
    `unrotated_every`: the same for layers without rotation. `local_theta`: before transformers 5,
    the field with the base of sliding layers, whose rotation is never scaled. `window_switch`
    names the field that must be true for `sliding_window` to count. `tied_by_default`: the head is
    the embedding where the config does not say. `others` are prefixes of tensors outside the
    decoder (a vision tower), carried along untouched.
    """

    model_type: str
    architecture: str
    gguf_arch: str
    layer: tuple[TensorRule, ...]
    outer: tuple[TensorRule, ...]
    head: TensorRule
    layer_prefix: str = "model.layers.{i}."
    outputs: Mapping[Part, str] = dataclasses.field(
        default_factory=lambda: {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    )
    full_every: int | None = None
    unrotated_every: int | None = None
    local_theta: str | None = None
    window_switch: str | None = None
    nested: str | None = None
    tied_by_default: bool = False
    others: tuple[str, ...] = ()

    def layer_name(self, index: int, rule: TensorRule) -> str:
        return self.layer_prefix.format(i=index) + rule.hf

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None for one outside the layers."""
        prefix, suffix = self.layer_prefix.split("{i}")
        number, dot, _ = name.removeprefix(prefix).partition(suffix)
        return int(number) if name.startswith(prefix) and dot and number.isdecimal() else None


def _linear(
    hf: str, gguf: str, rows: str, columns: str, rope: str | None = None
) -> tuple[TensorRule, TensorRule]:
    """A projection and its bias, which not every model of a family has."""
    return (
        TensorRule(f"{hf}.weight", f"{gguf}.weight", (rows, columns), rope),
        TensorRule(f"{hf}.bias", f"{gguf}.bias", (rows,), rope, optional=True),
    )


def _attention(*, interleaved: bool) -> tuple[TensorRule, ...]:
    return (
        *_linear("self_attn.q_proj", "attn_q", "q", "d", "heads" if interleaved else None),
        *_linear("self_attn.k_proj", "attn_k", "kv", "d", "kv_heads" if interleaved else None),
        *_linear("self_attn.v_proj", "attn_v", "kv", "d"),
        *_linear("self_attn.o_proj", "attn_output", "d", "q"),
    )


def _head_norms(q: str, k: str, plus: float = 0.0) -> tuple[TensorRule, ...]:
    """Norms of queries and keys: over a head (`head_dim`) or over all heads at once."""
    return (
        TensorRule("self_attn.q_norm.weight", "attn_q_norm.weight", (q,), plus=plus),
        TensorRule("self_attn.k_norm.weight", "attn_k_norm.weight", (k,), plus=plus),
    )


GATED_MLP = (
    *_linear("mlp.gate_proj", "ffn_gate", "ff", "d"),
    *_linear("mlp.up_proj", "ffn_up", "ff", "d"),
    *_linear("mlp.down_proj", "ffn_down", "d", "ff"),
)
FUSED_ATTENTION = (
    *_linear("self_attn.qkv_proj", "attn_qkv", "qkv", "d"),
    *_linear("self_attn.o_proj", "attn_output", "d", "q"),
)
FUSED_MLP = (
    *_linear("mlp.gate_up_proj", "ffn_up", "gate_up", "d"),
    *_linear("mlp.down_proj", "ffn_down", "d", "ff"),
)


def _norms(names: Mapping[str, str], plus: float = 0.0) -> tuple[TensorRule, ...]:
    """Norms on the residual stream, GGUF name -> transformers' name."""
    return tuple(
        TensorRule(f"{hf}.weight", f"{gguf}.weight", ("d",), plus=plus)
        for gguf, hf in names.items()
    )


PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _family(
    model_type: str,
    architecture: str,
    gguf_arch: str,
    layer: tuple[TensorRule, ...],
    plus: float = 0.0,
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        gguf_arch=gguf_arch,
        layer=layer,
        outer=(
            TensorRule("model.embed_tokens.weight", "token_embd.weight", ("vocab", "d")),
            TensorRule("model.norm.weight", "output_norm.weight", ("d",), plus=plus),
        ),
        head=TensorRule("lm_head.weight", "output.weight", ("vocab", "d")),
    )


def _llama_like(
    model_type: str,
    architecture: str,
    gguf_arch: str,
    *,
    interleaved: bool = True,
    norms: tuple[TensorRule, ...] = (),
) -> Family:
    layer = (*_norms(PRE_NORMS), *_attention(interleaved=interleaved), *norms, *GATED_MLP)
    return _family(model_type, architecture, gguf_arch, layer)


def _olmo(model_type: str, architecture: str) -> Family:
    attention = (*_attention(interleaved=False), *_head_norms("q", "kv"))
    layer = (*_norms(POST_NORMS), *attention, *GATED_MLP)
    return _family(model_type, architecture, "olmo2", layer)


def _gemma(
    model_type: str,
    architecture: str,
    gguf_arch: str,
    norms: Mapping[str, str],
    head_norms: tuple[TensorRule, ...] = (),
) -> Family:
    """Gemma's norms multiply by 1 + weight."""
    attention = (*_attention(interleaved=False), *head_norms)
    layer = (*_norms(norms, 1.0), *attention, *GATED_MLP)
    made = _family(model_type, architecture, gguf_arch, layer, 1.0)
    return dataclasses.replace(made, tied_by_default=True)


def _phi3() -> Family:
    layer = (*_norms(PRE_NORMS), *FUSED_ATTENTION, *FUSED_MLP)
    return _family("phi3", "Phi3ForCausalLM", "phi3", layer)


def _inside(family: Family, model_type: str, architecture: str, prefix: str) -> Family:
    """The same decoder as the text tower of a multimodal model."""
    return dataclasses.replace(
        family,
        model_type=model_type,
        architecture=architecture,
        layer_prefix=prefix + family.layer_prefix,
        outer=tuple(dataclasses.replace(r, hf=prefix + r.hf) for r in family.outer),
        head=dataclasses.replace(family.head, hf=prefix + family.head.hf),
        nested="text_config",
        others=("vision_tower.", "multi_modal_projector."),
    )


GEMMA3 = dataclasses.replace(
    _gemma(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        SANDWICH,
        _head_norms("head_dim", "head_dim", 1.0),
    ),
    full_every=6,
    local_theta="rope_local_base_freq",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _llama_like("llama", "LlamaForCausalLM", "llama"),
        _llama_like("mistral", "MistralForCausalLM", "llama"),
        dataclasses.replace(
            _llama_like("smollm3", "SmolLM3ForCausalLM", "smollm3"),
            unrotated_every=4,
            window_switch="use_sliding_window",
            tied_by_default=True,
        ),
        dataclasses.replace(
            _llama_like("qwen2", "Qwen2ForCausalLM", "qwen2", interleaved=False),
            window_switch="use_sliding_window",
        ),
        dataclasses.replace(
            _llama_like(
                "qwen3",
                "Qwen3ForCausalLM",
                "qwen3",
                interleaved=False,
                norms=_head_norms("head_dim", "head_dim"),
            ),
            window_switch="use_sliding_window",
        ),
        _gemma("gemma", "GemmaForCausalLM", "gemma", PRE_NORMS),
        dataclasses.replace(
            _gemma("gemma2", "Gemma2ForCausalLM", "gemma2", SANDWICH), full_every=2
        ),
        GEMMA3,
        _inside(GEMMA3, "gemma3", "Gemma3ForConditionalGeneration", "language_model."),
        _phi3(),
        _olmo("olmo2", "Olmo2ForCausalLM"),
        dataclasses.replace(
            _olmo("olmo3", "Olmo3ForCausalLM"), full_every=4, local_theta="rope_theta"
        ),
        _llama_like("granite", "GraniteForCausalLM", "granite"),
    )
}
"""transformers' `model_type` -> family."""


def expected_tensors(
    family: Family, sizes: Mapping[str, int]
) -> Iterator[tuple[str, TensorRule, tuple[int, ...], int | None]]:
    """Yield (name, rule, shape, layer or None) for every tensor the family may hold."""
    for rule in (*family.outer, family.head):
        yield rule.hf, rule, tuple(sizes[s] for s in rule.shape), None
    for index in range(sizes["layers"]):
        for rule in family.layer:
            name = family.layer_name(index, rule)
            yield name, rule, tuple(sizes[s] for s in rule.shape), index
