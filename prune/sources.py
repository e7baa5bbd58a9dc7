"""Where each tensor of a pruned model comes from: copied, zero, a weighted sum, another file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shortstack.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from shortstack.errors import ShortstackError, one_line
from shortstack.families import TensorRule, expected_tensors
from shortstack.prune.plan import PrunePlan
from shortstack.safetensors_header import open_head
from shortstack.shards import CHUNK_BYTES, ShardReader


class Source(Protocol):
    """One tensor to write: what it is, and its bytes in chunks."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def chunks(self, reader: ShardReader) -> Iterator[bytes | memoryview]: ...


@dataclass(frozen=True)
class Copy:
    """A tensor of the original, byte for byte."""

    name: str
    info: TensorInfo

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def chunks(self, reader: ShardReader) -> Iterator[bytes | memoryview]:
        return reader.chunks(self.name)


@dataclass(frozen=True)
class Zeros:
    """The output projection of a removed sub-block: it adds nothing to the residual stream."""

    dtype: str
    shape: tuple[int, ...]

    def chunks(self, reader: ShardReader) -> Iterator[bytes | memoryview]:
        left = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        zeros = memoryview(bytes(min(left, CHUNK_BYTES)))
        while left:
            yield zeros[:left]
            left -= min(left, CHUNK_BYTES)


@dataclass(frozen=True)
class Blend:
    """A weighted sum of the same tensor in several layers, in float32, rounded once."""

    weights: Mapping[str, float]
    info: TensorInfo

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def chunks(self, reader: ShardReader) -> Iterator[bytes | memoryview]:
        import numpy as np

        from shortstack.floats import from_stored, to_stored

        for start in range(0, self.info.n_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, self.info.n_bytes)
            total = np.zeros((stop - start) // DTYPE_BYTES[self.dtype], np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # looked for below
                for name, weight in self.weights.items():
                    values = from_stored(reader.read(name, start, stop), self.dtype)
                    total += np.float32(weight) * values
                stored = to_stored(total, self.dtype)
            if not np.isfinite(from_stored(bytes(stored), self.dtype)).all():
                raise ShortstackError(
                    f"merging {', '.join(self.weights)} gives values that {self.dtype} cannot "
                    "hold. Merge with smaller weights."
                )
            yield stored


@dataclass(frozen=True)
class FromFile:
    """A tensor of a safetensors file that the user gave."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def chunks(self, reader: ShardReader) -> Iterator[bytes | memoryview]:
        left = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        with self.file.open("rb") as opened:
            opened.seek(self.begin)
            while left:
                chunk = opened.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ShortstackError(f"{self.file} ends inside {self.name}. Make it again.")
                left -= len(chunk)
                yield chunk


def cut_identity(plan: PrunePlan) -> dict[str, Any]:
    """What decides the pruned model: the plan, and the content of the files that it names."""
    if not plan.replace:
        return plan.identity
    content = {}
    for layer, name in plan.replace.items():
        _open_block(Path(name))
        with Path(name).open("rb") as file:
            content[str(layer)] = hashlib.file_digest(file, "sha256").hexdigest()
    return {**plan.identity, "replace": content}


def plan_sources(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[str, Source]]:
    """Yield (new name, source) of every tensor of the pruned model, outer ones first.

    Raises ShortstackError for a merge of layers whose tensors differ in kind, and for a
    replacement file that lacks a tensor or holds another shape.
    """
    family, seen = checkpoint.family, set()
    new_number = {old: new for new, old in enumerate(plan.keep)}
    files = {layer: _open_block(Path(file)) for layer, file in plan.replace.items()}
    for changed, found in files.items():
        _check_no_more(checkpoint, plan.replace[changed], found)
    for name, rule, shape, layer in expected_tensors(family, checkpoint.dims):
        seen.add(name)
        if name not in checkpoint.tensors or (layer is not None and layer not in new_number):
            continue
        info = checkpoint.tensors[name]
        if layer is None:
            yield name, Copy(name, info)
            continue
        new_name = family.layer_name(new_number[layer], rule)
        if layer in files:
            yield new_name, _replacement(plan.replace[layer], files[layer], rule, shape)
        elif layer in plan.merge:
            yield new_name, _blend(checkpoint, plan, layer, rule)
        elif _is_removed(checkpoint, plan, layer, rule):
            yield new_name, Zeros(info.dtype, info.shape)
        else:
            yield new_name, Copy(name, info)
    for name in sorted(set(checkpoint.tensors) - seen):  # a vision tower
        yield name, Copy(name, checkpoint.tensors[name])


def _is_removed(checkpoint: Checkpoint, plan: PrunePlan, layer: int, rule: TensorRule) -> bool:
    outputs = checkpoint.family.outputs
    projection = rule.hf.rpartition(".")[0]
    return (layer in plan.attention and projection == outputs["attention"]) or (
        layer in plan.mlp and projection == outputs["mlp"]
    )


def _blend(checkpoint: Checkpoint, plan: PrunePlan, layer: int, rule: TensorRule) -> Blend:
    family = checkpoint.family
    names = {family.layer_name(s, rule): weight for s, weight in plan.merge[layer].items()}
    info = checkpoint.tensors[family.layer_name(layer, rule)]
    for name in names:
        other = checkpoint.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            raise ShortstackError(
                f"cannot merge into layer {layer}: {name} is missing or of another type. "
                "Merge layers whose tensors are alike."
            )
    return Blend(names, info)


def _open_block(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Name -> what and where, of a safetensors file."""
    try:
        head = open_head(file, "Name one that holds the tensors of one layer.")
    except FileNotFoundError:
        raise ShortstackError(
            f"there is no file {file}, which the plan names under replace. Name one from where you "
            "are, or by its whole path."
        ) from None
    except OSError as error:
        raise ShortstackError(
            f"{file} cannot be read ({one_line(str(error), 120)}). Name one that holds the tensors "
            "of one layer."
        ) from None
    return {
        name: (TensorInfo("", slot.dtype, slot.shape), head.at(name))
        for name, slot in head.slots.items()
    }


def _check_no_more(checkpoint: Checkpoint, file: str, found: Mapping[str, object]) -> None:
    """A tensor that the model has no place for would be left out of it in silence."""
    family = checkpoint.family
    held = {
        rule.hf
        for name, rule, _, place in expected_tensors(family, checkpoint.dims)
        if place is not None and name in checkpoint.tensors
    }
    extra = sorted(set(found) - held)
    if extra:
        raise ShortstackError(
            f"{file}: {extra[0]!r} is no tensor of a layer of {checkpoint.path} ({len(extra)} "
            "such). Name tensors as in one layer, e.g. mlp.up_proj.weight."
        )


def _replacement(
    file: str,
    found: Mapping[str, tuple[TensorInfo, int]],
    rule: TensorRule,
    shape: tuple[int, ...],
) -> FromFile:
    if rule.hf not in found:
        raise ShortstackError(
            f"{file} has no tensor {rule.hf!r}. Name a file with every tensor of one layer."
        )
    info, begin = found[rule.hf]
    if info.shape != shape or info.dtype not in DTYPE_BYTES:
        raise ShortstackError(
            f"{file}: {rule.hf} is {info.dtype} {list(info.shape)}, the model wants a float of "
            f"{list(shape)}. Make the layer again for this model."
        )
    return FromFile(Path(file), rule.hf, info.dtype, info.shape, begin)
