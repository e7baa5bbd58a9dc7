"""What config.json says of the decoder: sizes, windows, rotation, removed sub-blocks.

Names and defaults: transformers 5.23; the older spellings of 4.57 are read, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.errors import ShortstackError, one_line
from shortstack.families.table import FAMILIES, PARTS, Family, Part

Config = Mapping[str, Any]

REFUSED = {
    "mixture-of-experts": (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "enable_moe_block",
    ),
    "state-space or hybrid": (
        "ssm_cfg",
        "mamba_d_state",
        "mamba_d_conv",
        "state_size",
        "layers_block_type",
        "hybrid_override_pattern",
        "attn_layer_period",
        "linear_num_value_heads",
        "conv_L_cache",
    ),
}
"""Config fields that betray a kind of model we refuse by name."""

REMOVED = "removed_sub_blocks"
"""Config field: {"attention": [layers], "mlp": [layers]} whose output projection is zero."""

SLIDING, FULL = "sliding_attention", "full_attention"


def family_of(config: Config) -> Family:
    """Find the family of a config. Raises ShortstackError for one that is not in the table."""
    model_type = config.get("model_type")
    for level in (config, config.get("text_config") or {}):
        for kind, names in REFUSED.items():
            found = [name for name in names if level.get(name)]
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


def decoder_config(config: Config) -> Config:
    """The config of the decoder: nested in a multimodal model's, else the config itself."""
    nested = family_of(config).nested
    if nested is None:
        return config
    inner = config.get(nested)
    if not isinstance(inner, Mapping):
        raise ShortstackError(f"config.json has no {nested!r}. Download the folder again.")
    return inner


def dims(config: Config) -> dict[str, int]:
    """Sizes behind the symbols of TensorRule.shape. Raises ShortstackError for a missing field."""
    try:
        d, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or d // heads)
        ff = int(config["intermediate_size"])
        return {
            "layers": int(config["num_hidden_layers"]),
            "d": d,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "q": heads * head_dim,
            "kv": kv_heads * head_dim,
            "qkv": (heads + 2 * kv_heads) * head_dim,
            "ff": ff,
            "gate_up": 2 * ff,
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


def spell_out(family: Family, config: Config) -> dict[str, Any]:
    """The decoder's config with each layer's kind written down.

    Configs of the families' first releases leave it to transformers to count layers; after a cut
    that count would be wrong. Raises ShortstackError for a list of the wrong length.
    """
    made = dict(config)
    depth = int(config["num_hidden_layers"])
    if family.full_every is not None and not config.get("layer_types"):
        every = config.get("sliding_window_pattern") or family.full_every
        made["layer_types"] = [
            SLIDING if (index + 1) % int(every) else FULL for index in range(depth)
        ]
    if family.unrotated_every is not None and config.get("no_rope_layers") is None:
        every = config.get("no_rope_layer_interval") or family.unrotated_every
        made["no_rope_layers"] = [int((index + 1) % int(every) != 0) for index in range(depth)]
    if family.window_switch and not config.get("layer_types"):
        first = int(config.get("max_window_layers") or 0)
        on = config.get(family.window_switch) and config.get("sliding_window")
        made["layer_types"] = [SLIDING if on and i >= first else FULL for i in range(depth)]
    return made


def layer_windows(family: Family, config: Config) -> tuple[int | None, ...]:
    """How many tokens back each layer attends, itself included; None for all."""
    depth, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if family.window_switch and not config.get(family.window_switch):
        window = None
    types = spell_out(family, config).get("layer_types") or [SLIDING] * depth
    return tuple(int(window) if window and kind == SLIDING else None for kind in types)


def rotates(family: Family, config: Config) -> tuple[bool, ...]:
    """Whether each layer rotates its queries and keys (RoPE) or not (NoPE)."""
    flags = spell_out(family, config).get("no_rope_layers")
    depth = int(config["num_hidden_layers"])
    return tuple(bool(flag) for flag in flags) if flags else (True,) * depth


def removed_sub_blocks(config: Config) -> dict[Part, tuple[int, ...]]:
    """Sub-blocks that were removed alone, by layer. Raises ShortstackError for a bad field."""
    given = config.get(REMOVED) or {}
    depth = int(config["num_hidden_layers"])
    try:
        found: dict[Part, tuple[int, ...]] = {
            part: tuple(sorted({int(index) for index in given.get(part, ())})) for part in PARTS
        }
    except (AttributeError, TypeError, ValueError):
        found = {"attention": (-1,), "mlp": ()}
    if any(not 0 <= index < depth for layers in found.values() for index in layers):
        raise ShortstackError(
            f"config.json: {REMOVED} is {given!r}, not layers 0 to {depth - 1} for attention and "
            "mlp. Prune again from the original."
        )
    return found


def context_tokens(config: Config, *, windowed: bool = False) -> int | None:
    """How many tokens a runtime can run and agree on; None if the config does not say.

    A sliding window ends it, unless the runtime has windows: one that attends to everything
    computes another model beyond it.
    """
    family = family_of(config)
    inner = decoder_config(config)
    limits = [inner.get("max_position_embeddings")]
    if not windowed:
        limits += layer_windows(family, inner)
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def window_note(config: Config) -> tuple[str, ...]:
    """What to say of an artifact whose context a sliding window shortens."""
    context, longest = context_tokens(config), context_tokens(config, windowed=True)
    if context is None or context == longest:
        return ()
    return (
        f"context_length is {context}, the sliding window, not {longest}: there it has no window",
    )


ROPE_TYPES = ("default", "linear", "llama3")
"""Rotations that every exporter gets right. YaRN comes out of onnxruntime-genai's builder wrong."""


def rope_parameters(config: Config, kind: str = FULL) -> dict[str, Any]:
    """Rotation settings of the layers of a `kind`.

    From transformers 5's `rope_parameters`, which may hold one set for each kind of layer, or the
    older fields. Raises ShortstackError for settings that cannot be read.
    """
    given = config.get("rope_parameters")
    if isinstance(given, Mapping) and kind in given:
        given = given[kind]
    elif given is None:
        given = _older_rope(config, kind)
    try:
        name = given.get("rope_type") or given.get("type") or "default"
        theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    except (AttributeError, TypeError, ValueError):
        raise ShortstackError(
            f"config.json has rotation settings that cannot be read: {given!r}. "
            "Download the folder again."
        ) from None
    return {**given, "rope_type": name, "rope_theta": theta}


def _older_rope(config: Config, kind: str) -> dict[str, Any]:
    """Before transformers 5: `rope_theta`, `rope_scaling`, and a base for sliding layers alone."""
    family = FAMILIES.get(str(config.get("model_type")))
    local = config.get(family.local_theta) if family and family.local_theta else None
    if kind == SLIDING and local is not None:
        return {"rope_theta": local}
    made = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    if config.get("partial_rotary_factor") is not None:
        made["partial_rotary_factor"] = config["partial_rotary_factor"]
    return made


def check_rope(config: Config, known: tuple[str, ...] = ROPE_TYPES) -> None:
    """Raise ShortstackError for a rotation that an exporter would get wrong."""
    for kind in (FULL, SLIDING):
        found = rope_parameters(config, kind)["rope_type"]
        if found not in known:
            raise ShortstackError(
                f"rope scaling {found!r} cannot be exported. Known: {', '.join(known)}."
            )
