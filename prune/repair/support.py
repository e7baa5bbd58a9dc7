"""Which repair a model's folder can hold as ordinary weights, and where."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.prune.repair.boundaries import Boundary

BIASED = {"shift": ("llama", "granite"), "slot": ("llama",)}
"""Model types whose MLPs have biases if the config's `mlp_bias` is true, and in llama.cpp and
onnxruntime, too (not SmolLM3). llama.cpp's Granite cannot leave out the attention of a slot."""

ALONE = ("llama", "mistral", "qwen2")
"""Model types that may have a layer without attention in llama.cpp."""

_ALONE = ", ".join(ALONE)
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier")


def refusal(checkpoint: Checkpoint, kind: str) -> str | None:
    """Why no layer of this model can hold a repair of the kind `shift`, `scale`, `output` or
    `slot`; None if it can."""
    family, sizes = checkpoint.family, checkpoint.dims
    name = family.model_type
    if kind in BIASED and name not in BIASED[kind]:
        what = "MLPs with biases" + (" in layers without attention" if kind == "slot" else "")
        known = ", ".join(BIASED[kind])
        return f"not every runtime has {what} for {name}, only for {known}"
    if kind in ("scale", "output") and _has_post_norms(checkpoint):
        return f"{name} normalizes what a sub-block gives, so that no scale passes to the residual"
    if kind == "scale" and any(checkpoint.text.get(m) not in (None, 1.0) for m in MULTIPLIERS):
        return f"{name} multiplies the embedding or what a sub-block gives ({MULTIPLIERS[1]})"
    if kind == "own" and name not in ALONE:
        return f"llama.cpp cannot leave out the attention of a layer of {name}, only of {_ALONE}"
    if kind == "slot" and checkpoint.text.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act is {checkpoint.text['hidden_act']!r}; a linear MLP is made of silu"
    if kind == "slot" and sizes["ff"] < sizes["d"]:
        return f"MLPs of width {sizes['ff']} are too narrow for a hidden size of {sizes['d']}"
    return None


def skipped(checkpoint: Checkpoint, kind: str, boundary: Boundary) -> str | None:
    """Why this one gap of the cut `checkpoint` cannot be repaired so; None if it can."""
    if kind in ("shift", "output"):
        if boundary.position == 0:
            return "no layer before it has a down projection"
        if boundary.position - 1 in checkpoint.removed["mlp"]:
            return "the layer before it has no MLP"
    if kind in ("slot", "own"):
        if not boundary.dropped:
            return "no whole layer was dropped here whose place a slot could take"
        if boundary.position == 0:
            return "llama.cpp needs attention in layer 0"
    return None


def _has_post_norms(checkpoint: Checkpoint) -> bool:
    return any("post_feedforward_layernorm" in rule.hf for rule in checkpoint.family.layer)


def residual_multiplier(checkpoint: Checkpoint) -> float:
    """What a sub-block's result is multiplied by before it is added (Granite)."""
    return float(checkpoint.text.get("residual_multiplier") or 1.0)
