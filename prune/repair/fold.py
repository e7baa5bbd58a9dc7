"""Repairs as ordinary weights: into a projection that is there, or as a layer without attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.families import both_spellings
from shortstack.floats import from_stored, to_stored
from shortstack.progress import OnProgress, silent
from shortstack.prune.apply import prepare
from shortstack.prune.plan import PrunePlan
from shortstack.prune.repair.boundaries import Boundary
from shortstack.prune.repair.maps import Map, MapOutput, OwnMlp, Scale, Shift, Slot
from shortstack.prune.repair.support import residual_multiplier
from shortstack.prune.rewrite import rewrite
from shortstack.shards import ShardReader

Array = NDArray[np.float32]
UNIT_GATE = 1.2784645427610738
"""silu(UNIT_GATE) = 1."""

BIASES = ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")


class Editor:
    """The tensors of a cut checkpoint with the changes so far; layers by the cut's numbers."""

    def __init__(self, checkpoint: Checkpoint, reader: ShardReader) -> None:
        self.checkpoint, self._reader = checkpoint, reader
        self.changed: dict[str, Array] = {}

    def layer(self, index: int, name: str) -> str:
        return self.checkpoint.family.layer_prefix.format(i=index) + name

    def get(self, name: str) -> NDArray[np.float64] | None:
        """A tensor as it is now; None if there is none."""
        if name in self.changed:
            return self.changed[name].astype(np.float64)
        info = self.checkpoint.tensors.get(name)
        if info is None:
            return None
        stored = b"".join(self._reader.chunks(name))
        return from_stored(stored, info.dtype).reshape(info.shape).astype(np.float64)

    def put(self, name: str, values: NDArray[Any]) -> None:
        self.changed[name] = np.ascontiguousarray(values, np.float32)


def write_repaired(
    original: Checkpoint,
    pruned: Checkpoint,
    plan: PrunePlan,
    maps: Sequence[tuple[Boundary, Map]],
    out: Path,
    progress: OnProgress = silent,
) -> tuple[Checkpoint, PrunePlan]:
    """Write `pruned` with the maps folded in, from the input upwards, into the empty folder `out`.

    A slot takes the number of the last layer dropped at its gap: the returned plan, which plan.json
    in `out` has yet to say, is that this layer is kept and lost its attention.
    """
    slots = {b.dropped[-1]: map_ for b, map_ in maps if isinstance(map_, (Slot, OwnMlp))}
    with ShardReader(pruned) as reader:
        editor = Editor(pruned, reader)
        for boundary, map_ in maps:
            if isinstance(map_, Shift):
                _fold_shift(editor, boundary, map_)
            elif isinstance(map_, Scale):
                _fold_scale(editor, boundary, map_)
            elif isinstance(map_, MapOutput):
                _fold_output(editor, boundary, map_)
    made = _with_slots(plan, tuple(slots))
    numbers = {layer: new for new, layer in enumerate(made.keep)}
    changed, names = _renumbered(editor, [numbers[layer] for layer in plan.keep])
    config = dict(pruned.config)
    if slots:
        bare = dataclasses.replace(made, merge={}, replace={})  # the files may be gone
        config = both_spellings(prepare(original, bare).config)
    for layer, map_ in slots.items():
        if isinstance(map_, Slot):
            changed |= slot_tensors(pruned, numbers[layer], map_)
        else:
            changed |= _own_tensors(original, numbers[layer], map_)
    if any(isinstance(map_, (Slot, Shift)) for _, map_ in maps):
        config["mlp_bias"] = True
        changed |= _missing_biases(pruned, len(made.keep), {*names, *changed})
    written = rewrite(pruned, changed, out, config=config, names=names, progress=progress)
    return written, made


def _fold_shift(editor: Editor, boundary: Boundary, map_: Shift) -> None:
    """X + b: into the bias of the down projection before the gap."""
    name = editor.layer(boundary.position - 1, "mlp.down_proj.bias")
    before = editor.get(name)
    shift = map_.bias.double().numpy() / residual_multiplier(editor.checkpoint)
    editor.put(name, shift if before is None else before + shift)


def _fold_scale(editor: Editor, boundary: Boundary, map_: Scale) -> None:
    """alpha X: into the embedding and every output projection before the gap.

    The sub-blocks between see an RMSNorm of the scaled stream, which is the same but for epsilon.
    A head that is the embedding would be scaled, too: the final norm is divided instead.
    """
    checkpoint = editor.checkpoint
    embedding, norm = checkpoint.family.outer[0], checkpoint.family.outer[1]
    names = [embedding.hf]
    for index in range(boundary.position):
        for projection in checkpoint.family.outputs.values():
            names += [editor.layer(index, f"{projection}.{kind}") for kind in ("weight", "bias")]
    for name in names:
        values = editor.get(name)
        if values is not None:
            editor.put(name, values * map_.factor)
    weight = editor.get(norm.hf)
    if checkpoint.tied and weight is not None:
        editor.put(norm.hf, (weight + norm.plus) / map_.factor - norm.plus)


def _fold_output(editor: Editor, boundary: Boundary, map_: MapOutput) -> None:
    """M T: the down projection before the gap becomes T^T W."""
    stem = editor.layer(boundary.position - 1, editor.checkpoint.family.outputs["mlp"])
    change = map_.change.double().numpy().T / residual_multiplier(editor.checkpoint)
    for name in (f"{stem}.weight", f"{stem}.bias"):
        values = editor.get(name)
        if values is not None:
            editor.put(name, values + change @ values)


def _with_slots(plan: PrunePlan, slots: tuple[int, ...]) -> PrunePlan:
    return dataclasses.replace(
        plan,
        drop=tuple(layer for layer in plan.drop if layer not in slots),
        attention=tuple(sorted({*plan.attention, *slots})),
    )


def _renumbered(editor: Editor, number: Sequence[int]) -> tuple[dict[str, Array], dict[str, str]]:
    """Changed tensors by new name; new name -> name in the cut checkpoint for all of its own."""
    family = editor.checkpoint.family
    prefix, suffix = family.layer_prefix.split("{i}")

    def renamed(name: str) -> str:
        layer = family.layer_of(name)
        if layer is None:
            return name
        return f"{prefix}{number[layer]}{suffix}" + name.removeprefix(f"{prefix}{layer}{suffix}")

    changed = {renamed(name): values for name, values in editor.changed.items()}
    return changed, {renamed(name): name for name in editor.checkpoint.tensors}


def projection(checkpoint: Checkpoint, layer: int) -> tuple[Tensor, Tensor | None]:
    """The weight of a layer's down projection, (MLP width, width), and its bias, in float64."""
    with ShardReader(checkpoint) as reader:
        editor = Editor(checkpoint, reader)
        stem = editor.layer(layer, checkpoint.family.outputs["mlp"])
        weight, bias = (editor.get(f"{stem}.{kind}") for kind in ("weight", "bias"))
    assert weight is not None
    return torch.from_numpy(weight).T, None if bias is None else torch.from_numpy(bias)


def slot_tensors(checkpoint: Checkpoint, number: int, slot: Slot) -> dict[str, Array]:
    """The tensors of layer `number` that computes X + RMSNorm(X) W + c exactly.

    Attention: all zero. MLP: the gate has weight 0 and a bias with silu(bias) = 1, `up` copies its
    input, `down` is W. A bias that is rounded to 16 bits is made up for in W.
    """
    sizes, family = checkpoint.dims, checkpoint.family
    stored = next(iter(checkpoint.tensors.values())).dtype
    bias = from_stored(bytes(to_stored(np.array([UNIT_GATE], np.float32), stored)), stored)[0]
    gate = float(bias) / (1 + math.exp(-float(bias)))
    multiplier = residual_multiplier(checkpoint)
    made: dict[str, Array] = {}
    for rule in family.layer:
        name = family.layer_name(number, rule)
        held = family.layer_name(0, rule) in checkpoint.tensors or rule.hf in BIASES
        if held:
            shape = tuple(sizes[symbol] for symbol in rule.shape)
            value = 1.0 - rule.plus if "norm" in rule.hf else 0.0
            made[name] = np.full(shape, value, np.float32)
    prefix = family.layer_prefix.format(i=number)
    width = sizes["d"]
    made[f"{prefix}mlp.gate_proj.bias"][:] = bias
    made[f"{prefix}mlp.up_proj.weight"][:width] = np.eye(width, dtype=np.float32)
    made[f"{prefix}mlp.down_proj.weight"][:, :width] = (
        slot.matrix.double().numpy().T / gate / multiplier
    )
    made[f"{prefix}mlp.down_proj.bias"][:] = slot.constant.double().numpy() / multiplier
    return made


def _own_tensors(original: Checkpoint, number: int, own: OwnMlp) -> dict[str, Array]:
    """The dropped layer as it was, but with zeros for attention and the other down projection."""
    family, made = original.family, {}
    with ShardReader(original) as reader:
        editor = Editor(original, reader)
        for rule in family.layer:
            values = editor.get(family.layer_name(own.layer, rule))
            if values is None:
                continue
            if rule.part == "attention":
                values = np.zeros_like(values)
            if rule.hf == f"{family.outputs['mlp']}.weight":
                values = own.down.double().numpy().T
            made[family.layer_name(number, rule)] = np.ascontiguousarray(values, np.float32)
    return made


def _missing_biases(checkpoint: Checkpoint, n_layers: int, held: set[str]) -> dict[str, Array]:
    """Zeros: with `mlp_bias` every projection of every MLP has a bias."""
    family, sizes = checkpoint.family, checkpoint.dims
    return {
        name: np.zeros(sizes[rule.shape[0]], np.float32)
        for index in range(n_layers)
        for rule in family.layer
        if rule.hf in BIASES and (name := family.layer_name(index, rule)) not in held
    }
