"""The key-values of a GGUF file after a cut: which change, and which cuts no key can express."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shortstack import gguf_archs
from shortstack.errors import ShortstackError
from shortstack.gguf_archs import HEADS, PATTERN_READ_SINCE, WINDOW, WINDOW_PATTERN, GgufArch
from shortstack.gguf_header import (
    ARRAY,
    BOOL,
    GGML_TYPES,
    SCALARS,
    STRING,
    GgufHeader,
    KeyValue,
    TensorEntry,
    encode_array,
    encode_scalar,
)
from shortstack.safe_cuts import is_safe, nearest, spell

FOREIGN_ARRAYS = ("general.", "split.", "tokenizer.")
"""Namespaces whose arrays say nothing of layers."""


@dataclass(frozen=True)
class KeyEdits:
    """All key-values of the new file in order: new bytes, or a range of the source."""

    pieces: tuple[bytes | range, ...]
    count: int
    changed: tuple[str, ...]
    least_runtime: str | None = None
    """The oldest runtime that computes the file as meant; None if it asks for nothing new."""
    factor: float = 1.0
    """What the tensors named `scale_in` are multiplied with."""
    scale_in: str | None = None
    notes: tuple[str, ...] = ()


def load_arch(header: GgufHeader) -> GgufArch:
    """The architecture of a file whose layers can be cut. Raises ShortstackError by name if not."""
    name = header.text("general.architecture")
    try:
        arch = gguf_archs.arch(name)
    except ShortstackError as error:
        raise ShortstackError(f"{header.file} cannot be cut: {error}") from None
    if header.integer("split.count") > 1:
        raise ShortstackError(
            f"{header.file} is one of {header.integer('split.count')} split files. "
            "Merge them first (llama-gguf-split --merge)."
        )
    for key, what in gguf_archs.BLOCKERS.items():
        if f"{name}.{key}" in header.keys and header.integer(f"{name}.{key}") > 0:
            raise ShortstackError(
                f"{header.file} has {what} ({name}.{key}): its layers cannot be cut one by one. "
                "Use a dense model."
            )
    for key in arch.needs_keys:
        if f"{name}.{key}" not in header.keys:
            raise ShortstackError(
                f"{header.file} has no {name}.{key}, so llama.cpp computes it from the number of "
                "layers. Convert the model anew with a converter that writes it."
            )
    return arch


def layer_of(header: GgufHeader, tensor: str, n_layers: int) -> int | None:
    """The layer that a tensor belongs to. Raises ShortstackError if there is none such."""
    match = re.match(r"blk\.(\d+)\.", tensor)
    if match is None:
        if ".blk." in tensor:
            raise ShortstackError(
                f"{header.file}: the tensor {tensor} belongs to an encoder or a second decoder. "
                "Only plain decoders can be cut."
            )
        return None
    if int(match[1]) >= n_layers:
        raise ShortstackError(
            f"{header.file}: the tensor {tensor} lies beyond the {n_layers} layers that the file "
            "says it has. Convert the model anew."
        )
    return int(match[1])


def scale_of(header: GgufHeader, edits: KeyEdits, tensor: TensorEntry) -> float:
    """What a tensor is multiplied with so that the cut computes what it should."""
    if edits.factor == 1.0 or edits.scale_in is None:
        return 1.0
    if not re.fullmatch(rf"blk\.\d+\.{re.escape(edits.scale_in)}", tensor.name):
        return 1.0
    if GGML_TYPES[tensor.kind].name != "F32":
        raise ShortstackError(
            f"{header.file}: {tensor.name} is {GGML_TYPES[tensor.kind].name}, and has to take up "
            "another attention scale at this depth, which needs F32. Cut another number of layers."
        )
    return edits.factor


def edit_keys(header: GgufHeader, arch: GgufArch, keep: Sequence[int]) -> KeyEdits:
    """Key-values for the kept layers. Raises ShortstackError if no key can say what they are."""
    n_layers = header.integer(f"{arch.name}.block_count")
    _check_rhythm(header, arch, n_layers, keep)
    _check_ends(header, arch, keep)
    new = dict(_shortened(header, arch, n_layers, keep))
    new[f"{arch.name}.block_count"] = _block_count(header, arch, len(keep))
    flags, least_runtime = _window_flags(header, arch, n_layers, keep)
    if flags is not None:
        pattern = f"{arch.name}.{WINDOW_PATTERN}"
        new[pattern] = encode_array(pattern, BOOL, struct.pack(f"<{len(flags)}?", *flags))
    pieces: list[bytes | range] = [
        new.get(name, range(entry.start, entry.end)) for name, entry in header.keys.items()
    ]
    pieces += [raw for name, raw in new.items() if name not in header.keys]
    factor = _scale_factor(header, arch, n_layers, len(keep))
    scale_in = arch.depth_rule.scale_in if arch.depth_rule else None
    notes = (f"{scale_in} times {factor:.6f}, for {len(keep)} layers",) if factor != 1.0 else ()
    return KeyEdits(tuple(pieces), len(pieces), tuple(new), least_runtime, factor, scale_in, notes)


def _shortened(
    header: GgufHeader, arch: GgufArch, n_layers: int, keep: Sequence[int]
) -> Iterator[tuple[str, bytes]]:
    for name, entry in header.keys.items():
        if entry.kind != ARRAY or name.startswith(FOREIGN_ARRAYS):
            continue
        inner = name.removeprefix(f"{arch.name}.")
        if inner in gguf_archs.PER_LAYER or name in gguf_archs.PER_LAYER_ANYWHERE:
            yield name, _kept_items(header, entry, n_layers, keep)
        elif inner not in gguf_archs.NOT_PER_LAYER and (inner != name or entry.count == n_layers):
            raise ShortstackError(
                f"{header.file}: nothing is known of the array {name} ({entry.count} items), which "
                "may hold one a layer. Cut the original folder instead."
            )


def _kept_items(header: GgufHeader, entry: KeyValue, n_layers: int, keep: Sequence[int]) -> bytes:
    if entry.count != n_layers or entry.item_kind in (STRING, None):
        raise ShortstackError(
            f"{header.file}: the array {entry.name} has {entry.count} items, the file "
            f"{n_layers} layers. Download it again or convert it anew."
        )
    assert entry.item_kind is not None
    each = struct.calcsize(SCALARS[entry.item_kind])
    with header.file.open("rb") as stream:
        stream.seek(entry.value_start)
        raw = stream.read(entry.end - entry.value_start)
    kept = b"".join(raw[layer * each : (layer + 1) * each] for layer in keep)
    return encode_array(entry.name, entry.item_kind, kept)


def _block_count(header: GgufHeader, arch: GgufArch, n_layers: int) -> bytes:
    entry = header.keys[f"{arch.name}.block_count"]
    return encode_scalar(entry.name, entry.kind, n_layers)


def _window_flags(
    header: GgufHeader, arch: GgufArch, n_layers: int, keep: Sequence[int]
) -> tuple[tuple[bool, ...] | None, str | None]:
    """The pattern to write, if the file needs one it lacks, and the runtime that reads it."""
    if arch.window_period is None:
        return None, None
    if arch.window_needs_key and header.integer(f"{arch.name}.{WINDOW}") <= 0:
        return None, None
    given = header.value(f"{arch.name}.{WINDOW_PATTERN}")
    if isinstance(given, list):
        same = tuple(bool(given[layer]) for layer in keep) == arch.windowed(len(keep))
        return None, None if same else PATTERN_READ_SINCE
    period = None if given is None else header.integer(f"{arch.name}.{WINDOW_PATTERN}")
    before = arch.windowed(n_layers, period)
    flags = tuple(before[layer] for layer in keep)
    if flags == arch.windowed(len(keep), period):
        return None, None
    return flags, PATTERN_READ_SINCE


def _check_rhythm(header: GgufHeader, arch: GgufArch, n_layers: int, keep: Sequence[int]) -> None:
    every = arch.unrotated_period
    if every is None:
        return
    kinds = [arch.rotates(layer) for layer in range(n_layers)]
    drop = sorted(set(range(n_layers)) - set(keep))
    if is_safe(kinds, drop, arch.rotates):
        return
    cuts = " or ".join(f"--drop {spell(cut)}" for cut in nearest(kinds, drop, arch.rotates))
    raise ShortstackError(
        f"{header.file}: without {spell(drop)}, layers would move between rotated and unrotated "
        f"places: in {arch.name}, llama.cpp leaves out the rotation in every {every}th layer and "
        f"no key can say otherwise. Nearest safe cuts: {cuts}."
    )


def _check_ends(header: GgufHeader, arch: GgufArch, keep: Sequence[int]) -> None:
    wanted = (("first", keep[0], arch.first_needs), ("last", keep[-1], arch.last_needs))
    for where, layer, keys in wanted:
        for key in keys:
            if _of_layer(header, f"{arch.name}.{key}", layer) == 0:
                raise ShortstackError(
                    f"{header.file}: layer {layer} would come {where}, and llama.cpp cannot have a "
                    f"{where} layer with {arch.name}.{key} = 0. Keep the {where} layer."
                )
    sized = f"{arch.name}.attention.key_length" in header.keys
    heads = [_of_layer(header, f"{arch.name}.{HEADS}", layer) for layer in (0, keep[0])]
    if not sized and heads[0] != heads[1]:
        raise ShortstackError(
            f"{header.file} has no {arch.name}.attention.key_length: llama.cpp would take the size "
            f"of a head from layer {keep[0]}, which has another number of heads. Keep layer 0."
        )


def _of_layer(header: GgufHeader, name: str, layer: int) -> int | None:
    found = header.value(name)
    if isinstance(found, list):
        return int(found[layer]) if layer < len(found) else None
    return None if found is None else header.integer(name)


def _scale_factor(header: GgufHeader, arch: GgufArch, before: int, after: int) -> float:
    """Queries have to grow by old over new attention scale where the depth chooses it."""
    rule = arch.depth_rule
    if rule is None or (before in rule.depths) == (after in rule.depths):
        return 1.0
    if rule.attention_scale:
        factor = _scale(header, arch, before in rule.depths) / _scale(
            header, arch, after in rule.depths
        )
        if factor == 1.0 or rule.scale_in is not None:
            return factor
    raise ShortstackError(
        f"{header.file}: at {after} layers instead of {before}, llama.cpp changes {rule.what} of "
        f"{arch.name} without a word, and no key can say otherwise. Cut the original folder and "
        "export to onnx."
    )


def _scale(header: GgufHeader, arch: GgufArch, special: bool) -> float:
    heads = _of_layer(header, f"{arch.name}.{HEADS}", 0) or 1
    width = header.integer(f"{arch.name}.embedding_length")
    usual = header.integer(f"{arch.name}.attention.key_length", width // heads)
    return float((width // heads if special else usual) ** -0.5)
