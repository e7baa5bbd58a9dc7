"""How many parameters a forward pass multiplies with each token: what its arithmetic follows from.

Of N such parameters a token takes 2 N operations, a multiplication and an addition each; embedding
tables are only looked up (Kaplan et al. 2020, Scaling Laws for Neural Language Models, table 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shortstack.checkpoint import Checkpoint
from shortstack.gguf_header import GgufHeader

EMBEDDING = "embed_tokens.weight"
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"
GGUF_TABLES = ("token_embd.", "output.", "position_embd.", "token_types.", "per_layer_token_embd.")
"""Looked up, or the head: no products of a layer."""


@dataclass(frozen=True)
class Multiplied:
    """`matmul_params`: of the layers' projections, of experts those in use; no tables, norms,
    biases. `head_params`: of the head, which some runtimes compute for a prompt's last token alone.
    Both None where they are not known.
    """

    matmul_params: int | None = None
    head_params: int | None = None


def of_checkpoint(checkpoint: Checkpoint) -> Multiplied:
    """By the shapes of its tensors; what lies outside the decoder (a vision tower) counts not."""
    family = checkpoint.family
    head = embedding = layers = 0
    for name, info in checkpoint.tensors.items():
        size = math.prod(info.shape)
        if name == family.head.hf:
            head = size
        elif name.endswith(EMBEDDING):
            embedding = size
        elif len(info.shape) > 1 and not name.startswith(family.others):
            layers += size
    return Multiplied(layers, head or embedding)


def of_gguf(header: GgufHeader) -> Multiplied:
    """By the shapes in the header; the head is the token table where there is none of its own.
    Not known of a file without either."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in header.tensors}
    head = sizes.get(GGUF_HEAD, sizes.get(GGUF_EMBEDDING))
    if head is None:
        return Multiplied()
    used = experts_in_use(header)
    layers = sum(
        sizes[tensor.name] * (used if "_exps" in tensor.name else 1.0)
        for tensor in header.tensors
        if tensor.name.endswith(".weight")
        and sum(width > 1 for width in tensor.dims) > 1
        and not tensor.name.startswith(GGUF_TABLES)
    )
    return Multiplied(round(layers), head)


def experts_in_use(header: GgufHeader) -> float:
    """Which part of its experts a token goes through; 1 where there are none."""
    arch = header.text("general.architecture")
    experts = header.integer(f"{arch}.expert_count")
    return header.integer(f"{arch}.expert_used_count") / experts if experts else 1.0
