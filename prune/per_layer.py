"""Every config field that speaks of single layers, and what a cut does to it.

Names and meanings: transformers 5.23. A field that is forgotten here would give a model that
loads and computes something else, so a list that merely looks per-layer is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.families import FAMILIES, REMOVED, spell_out

DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NESTED = ("text_config", "language_config", "llm_config")
"""Where a multimodal config keeps its decoder."""

LISTS = frozenset(
    {
        "activation_sparsity_pattern",
        "attention_layers",
        "block_configs",
        "ffn_multipliers",
        "hybrid_override_pattern",
        "indexer_types",
        "intermediate_size",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "moe_layer_freq",
        "no_rope_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_kv_heads",
        "num_query_heads",
    }
)
"""One entry a layer (some are a single number in other families): keep the kept ones."""

INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "full_attn_idxs",
        "hybrid_layer_ids",
        "mlp_only_layers",
        "moe_layers",
    }
)
"""Layer numbers: drop and renumber."""

FIRST_LAYERS = frozenset({"max_window_layers", "first_k_dense_replace"})
"""A count of layers from the start."""

LAST_LAYERS = frozenset({"num_kv_shared_layers"})
"""A count of layers up to the end."""

NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "keys_to_ignore_at_inference",
        "mtp_layer_types",
        "pad_token_id",
        "suppress_tokens",
    }
)
"""Lists that never are, whatever their length (mtp_layer_types: of the extra prediction layers)."""

REFUSED = {
    "attention_types": "repeats a nested pattern over the layers",
    "linear_attn_config": "numbers its layers from 1 in a nested list",
    "scale_depth": "scales every layer's output by the number of layers",
}
"""Fields whose cut we know to be wrong without more work."""


@dataclass(frozen=True)
class Period:
    """A field that gives every n-th layer another kind, unless one of the `rulers` spells it out.

    Layer i is of that kind if i = offset modulo the period; by default the last of each period.
    """

    rulers: tuple[str, ...] = ()
    offset_field: str | None = None
    default_offset: int = -1


PERIODS = {
    "_sliding_window_pattern": Period(("layer_types",)),
    "attn_layer_period": Period(("layers_block_type",), "attn_layer_offset", 0),
    "block_types": Period(("layers_block_type",)),
    "decoder_sparse_step": Period(("mlp_layer_types",)),
    "expert_layer_period": Period((), "expert_layer_offset", 0),
    "full_attention_interval": Period(("layer_types",)),
    "global_attn_every_n_layers": Period(("layer_types",), None, 0),
    "interleave_moe_layer_step": Period(("moe_layers",)),
    "moe_layer_freq": Period(("mlp_layer_types",), None, 0),
    "no_rope_layer_interval": Period(("no_rope_layers",)),
    "sliding_window_pattern": Period(("layer_types",)),
}
"""A number n, or a pattern (text or list) that repeats."""


@dataclass(frozen=True)
class Cut:
    """Which of `n_layers` are kept, by their old numbers."""

    n_layers: int
    keep: tuple[int, ...]

    def renumbered(self, layers: Iterable[int]) -> list[int]:
        """New numbers of the kept ones among `layers`."""
        wanted = set(layers)
        return [new for new, old in enumerate(self.keep) if old in wanted]

    def repeats(self, kind_of: Callable[[int], object]) -> bool:
        """Whether each kept layer keeps its kind when its new number decides it."""
        return all(kind_of(new) == kind_of(old) for new, old in enumerate(self.keep))


def cut_config(config: Mapping[str, Any], n_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    """Return the config of the model that has only the layers `keep`.

    Raises ShortstackError naming the field that cannot follow the cut, and why.
    """
    cut = Cut(n_layers, tuple(keep))
    nested = [name for name in NESTED if isinstance(config.get(name), Mapping)]
    result = dict(config)
    for name in nested:
        result[name] = _cut_level(_spelled_out(config[name], config), cut)
    result = {**result, **_spelled_out(result, config)} if not nested else result
    return _cut_level(result, cut) if "num_hidden_layers" in config or not nested else result


def _cut_level(config: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    _check_fields(config, cut)
    _check_shared_cache(config, cut)
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name in PERIODS and _is_set(value) and not _is_layer_list(name, value, cut):
            if not _keep_period(name, config, cut):
                continue  # the explicit list rules; a stale period would mislead other readers
            result[name] = value
        else:
            result[name] = _cut_field(name, value, cut)
    return result


def _spelled_out(level: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With each layer's kind written down, where the family otherwise counts layers."""
    family = FAMILIES.get(str(config.get("model_type")))
    return spell_out(family, level) if family is not None else level


def _cut_field(name: str, value: Any, cut: Cut) -> Any:
    if name == REMOVED:
        return {part: cut.renumbered(layers) for part, layers in value.items()}
    if name in DEPTH and value == cut.n_layers:
        return len(cut.keep)
    if _is_layer_list(name, value, cut):
        kept = [value[index] for index in cut.keep]
        return "".join(kept) if isinstance(value, str) else kept
    if name in INDEX_LISTS and isinstance(value, list):
        return cut.renumbered(index % cut.n_layers for index in value)  # some count from the end
    if name in FIRST_LAYERS and isinstance(value, int):
        return sum(index < value for index in cut.keep)
    if name in LAST_LAYERS and isinstance(value, int):
        return sum(index >= cut.n_layers - value for index in cut.keep)
    return value


def _check_fields(config: Mapping[str, Any], cut: Cut) -> None:
    depth = config.get("num_hidden_layers", cut.n_layers)
    if depth != cut.n_layers:
        raise ShortstackError(
            f"the plan is for {cut.n_layers} layers, the config has {depth}. Plan again."
        )
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ShortstackError(
                f"config field {name!r} {reason}; cutting it is not supported. "
                "Choose another model."
            )
    known = LISTS | INDEX_LISTS | NOT_PER_LAYER | set(PERIODS)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == cut.n_layers and name not in known:
            raise ShortstackError(
                f"config field {name!r} has {len(value)} entries, one for each layer by the look "
                "of it, and is unknown. Please report the model; it cannot be cut safely."
            )
        if name in LISTS and isinstance(value, (list, str)) and len(value) != cut.n_layers:
            raise ShortstackError(
                f"config field {name!r} has {len(value)} entries for {cut.n_layers} layers. "
                "Download the folder again."
            )


def _keep_period(name: str, config: Mapping[str, Any], cut: Cut) -> bool:
    """Whether a period still holds. Raises ShortstackError if not and nothing else rules."""
    period, value = PERIODS[name], config[name]
    if isinstance(value, int):
        offset = config.get(period.offset_field or "", period.default_offset)
        holds = cut.repeats(lambda index: (index - offset) % value == 0)
        length = value
    else:
        holds = cut.repeats(lambda index: value[index % len(value)])
        length = len(value)
    ruled = any(config.get(ruler) is not None for ruler in period.rulers)
    if holds or ruled:
        return holds
    raise ShortstackError(
        f"config field {name!r} makes layers differ with a period of {length}, and this cut "
        f"breaks the rhythm. Drop {length} layers in a row, or a multiple of {length}."
    )


def _check_shared_cache(config: Mapping[str, Any], cut: Cut) -> None:
    """The last layers may reuse the keys and values of an earlier one: that one must stay.

    Each shared layer reads the last unshared layer of its own type.
    """
    shared = config.get("num_kv_shared_layers") or 0
    first = cut.n_layers - shared
    if not shared or max(cut.keep) < first:
        return
    types = config.get("layer_types") or ["all"] * cut.n_layers
    last_of_type = {types[index]: index for index in range(first)}
    for index in (index for index in cut.keep if index >= first):
        source = last_of_type.get(types[index])
        if source is not None and source not in cut.keep:
            raise ShortstackError(
                f"layer {index} reuses the cache of layer {source} (num_kv_shared_layers = "
                f"{shared}), which this cut drops. Keep layer {source}."
            )


def _is_layer_list(name: str, value: Any, cut: Cut) -> bool:
    return name in LISTS and isinstance(value, (list, str)) and len(value) == cut.n_layers


def _is_set(value: Any) -> bool:
    return isinstance(value, (int, list, str)) and not isinstance(value, bool) and bool(value)
