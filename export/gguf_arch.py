"""Which of llama.cpp's architectures a checkpoint becomes, and what it decides by layer number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families import layer_windows, rotates, window_note
from shortstack.gguf_archs import ARCHS, PATTERN_READ_SINCE, GgufArch
from shortstack.safe_cuts import nearest, spell

SUB_BLOCKS = ("llama", "mistral", "qwen2")
"""Model types that llama.cpp's `deci` can run with sub-blocks left out: the same tensors, no norms
of queries and keys, rotation of adjacent pairs once the rows are interleaved."""

ZERO_MLP = 32
"""Width of the all-zero MLP that stands for a removed one: with a width of 0 deci skips the
addition of the attention's output, too."""


DECI_TRIED_WITH = "llama-cpp-python 0.3.36"
"""Older ones have deci, too, but no one has tried files like these there."""


@dataclass(frozen=True)
class Target:
    """A checkpoint as an architecture of llama.cpp: everything that depends on single layers."""

    arch: GgufArch
    windows: tuple[int | None, ...]
    rotated: tuple[bool, ...]
    no_attention: frozenset[int]
    no_mlp: frozenset[int]
    query_scale: float
    """What queries must be multiplied by, since llama.cpp chooses the attention scale itself."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Target:
        family, config, removed = checkpoint.family, checkpoint.text, checkpoint.removed
        cut = bool(removed["attention"] or removed["mlp"])
        name = "deci" if cut and family.model_type in SUB_BLOCKS else family.gguf_arch
        return cls(
            arch=ARCHS[name],
            windows=layer_windows(family, config),
            rotated=rotates(family, config),
            no_attention=frozenset(removed["attention"]),
            no_mlp=frozenset(removed["mlp"]),
            query_scale=_query_scale(ARCHS[name], checkpoint),
        )

    @property
    def has_windows(self) -> bool:
        """Whether the architecture can give single layers a window."""
        return self.arch.window_period is not None

    @property
    def window(self) -> int:
        """The window of the layers that have one; any size where none has."""
        return max((size for size in self.windows if size is not None), default=4096)

    @property
    def writes_window(self) -> bool:
        """Whether the file must speak of windows: some layer has one, or is assumed to."""
        return any(self.windows) or not self.arch.window_needs_key

    @property
    def needs_pattern(self) -> bool:
        """Whether llama.cpp's own rhythm would give other layers the window."""
        wanted = tuple(size is not None for size in self.windows)
        return self.writes_window and self.arch.windowed(len(self.windows)) != wanted

    @property
    def interleaves_all(self) -> bool:
        """Rows of Q and K are stored in rotation pairs though the family's own are not."""
        return self.arch.name == "deci"

    def per_layer(self, checkpoint: Checkpoint, size: str) -> int | Sequence[int]:
        """`heads`, `kv_heads` or `ff`: one number, or in deci one a layer."""
        value = checkpoint.dims[size]
        if self.arch.name != "deci":
            return value
        gone, instead = (self.no_mlp, ZERO_MLP) if size == "ff" else (self.no_attention, 0)
        return [instead if i in gone else value for i in range(checkpoint.n_layers)]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ShortstackError, with the nearest cuts that work, for one that llama.cpp cannot."""
        self._check_sub_blocks(checkpoint)
        for layer, rotated in enumerate(self.rotated):
            if rotated != self.arch.rotates(layer):
                raise ShortstackError(
                    f"llama.cpp's {self.arch.name} leaves out the rotation in every "
                    f"{self.arch.unrotated_period}th layer, whatever the model says, and after "
                    f"this cut layer {layer} breaks that rhythm. "
                    f"{_advice(checkpoint, self.arch)}"
                )

    def _check_sub_blocks(self, checkpoint: Checkpoint) -> None:
        if not (self.no_attention or self.no_mlp):
            return
        first = min(self.no_attention | self.no_mlp)
        part = "attention" if first in self.no_attention else "MLP"
        if self.arch.name != "deci":
            raise ShortstackError(
                f"llama.cpp's {self.arch.name} cannot leave out the {part} of layer {first}: only "
                f"{', '.join(SUB_BLOCKS)} can lose sub-blocks there. Drop whole layers, "
                "or export to onnx."
            )
        if 0 in self.no_attention:
            raise ShortstackError(
                "llama.cpp reads the head size off layer 0, so its attention must stay. "
                "Nearest safe cuts: attention of layer 1 instead, or layer 0 as a whole; or "
                "export to onnx."
            )


def target_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a user of the file has to know of the architecture that it is written for."""
    target = Target.of(checkpoint)
    notes: tuple[str, ...] = () if target.has_windows else window_note(checkpoint.config)
    if _reads_pattern(target):
        notes += (
            f"needs {PATTERN_READ_SINCE} or newer: which layers have a window is spelled out",
        )
    if target.arch.name == "deci":
        notes += (
            f"sub-blocks are left out through llama.cpp's arch deci, tried with {DECI_TRIED_WITH}",
        )
    if target.no_mlp:
        notes += (f"a removed MLP is written as zeros of width {ZERO_MLP}, as deci needs one",)
    return notes


def least_runtime(checkpoint: Checkpoint) -> str | None:
    """The oldest llama-cpp-python that is known to read the file right; None if any recent one."""
    target = Target.of(checkpoint)
    if _reads_pattern(target):
        return PATTERN_READ_SINCE
    return DECI_TRIED_WITH if target.arch.name == "deci" else None


def _reads_pattern(target: Target) -> bool:
    return target.needs_pattern and target.has_windows


def _query_scale(arch: GgufArch, checkpoint: Checkpoint) -> float:
    """sqrt(s) / sqrt(m): scores are to be divided by sqrt(m), llama.cpp divides by sqrt(s).

    It takes the head size for s, and at one depth of each Gemma (its 27B) the hidden size shared
    out among the heads; the config's m is `query_pre_attn_scalar`.
    """
    wanted = checkpoint.text.get("query_pre_attn_scalar")
    if arch.depth_rule is None or not arch.depth_rule.attention_scale or wanted is None:
        return 1.0
    sizes = checkpoint.dims
    special = checkpoint.n_layers in arch.depth_rule.depths
    assumed = sizes["d"] // sizes["heads"] if special else sizes["head_dim"]
    return math.sqrt(assumed / float(wanted))


def _advice(checkpoint: Checkpoint, arch: GgufArch) -> str:
    """The nearest safe cuts, if the plan that made the checkpoint says what was cut."""
    facts = checkpoint.cut_facts
    kinds: Any = facts.get("rotates")
    if kinds is None:
        return f"Drop whole groups of {arch.unrotated_period} layers, or export to onnx."
    safe = nearest(kinds, facts["drop"], arch.rotates)
    spelled = "; ".join(spell(drop) for drop in safe) or "none"
    return f"Nearest safe cuts: {spelled}. Or export to onnx."
