"""An exported ONNX decoder as several graphs, cut between layers: a prompt may stop at a cut."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shortstack.disk import disk_errors
from shortstack.early_exit.segments import SEGMENTS, Segment, Segments
from shortstack.errors import ShortstackError
from shortstack.export.onnx_graph import CACHE, SKIP_NORM, layer_of
from shortstack.manifest import write_text

MODEL, DATA = "model.onnx", "model.onnx.data"
LOGITS, IDS = "logits", "input_ids"
BEFORE = "__before_the_cut"


@dataclass(frozen=True)
class _Cut:
    """Where a graph is cut: values that cross, and those whose sum is the hidden state."""

    crossing: tuple[str, ...]
    hidden: tuple[str, ...]


def split(folder: Path, cuts: Sequence[int], out: Path, source_sha256: str) -> Segments:
    """Cut `folder`/model.onnx after each number of layers in `cuts`; write segments-*.onnx, their
    weights once, and segments.json into the existing folder `out`.

    Raises ShortstackError for cuts that the graph has not and for graphs whose layers hand over
    something else than one hidden state.
    """
    n_layers = _n_layers(ir.load(folder / MODEL).graph, folder)
    if list(cuts) != sorted(set(cuts)) or not cuts or not 0 < cuts[0] <= cuts[-1] < n_layers:
        raise ShortstackError(
            f"{folder} has {n_layers} layers and cannot be cut after {list(cuts)}. "
            f"Name rising numbers from 1 to {n_layers - 1}."
        )
    found = [_cut(ir.load(folder / MODEL).graph, cut, folder) for cut in cuts]
    edges = [0, *cuts, n_layers]
    segments = []
    with disk_errors(out / DATA):
        _share(folder / DATA, out / DATA)
        for number, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
            before = found[number - 1] if number else None
            after = found[number] if number < len(found) else None
            file = f"segment-{number}.onnx"
            model = _segment(folder / MODEL, (first, end), before, after)
            inputs = tuple(str(value.name) for value in model.graph.inputs)
            ir.save(model, out / file)
            hidden = after.hidden if after else ()
            crossing = after.crossing if after else ()
            segments.append(Segment(file, end, inputs, crossing, hidden))
    made = Segments(tuple(segments), n_layers, source_sha256)
    write_text(out / SEGMENTS, json.dumps(made.to_dict(), indent=1) + "\n")
    return made


def _share(source: Path, target: Path) -> None:
    """The same bytes in both places: a link where the disk can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _n_layers(graph: ir.Graph, folder: Path) -> int:
    numbers = [int(m[2]) for value in graph.inputs if (m := CACHE.match(str(value.name)))]
    if not numbers:
        raise ShortstackError(
            f"{folder / MODEL} has no KV cache by layers. Export it with shortstack."
        )
    return max(numbers) + 1


def _cut(graph: ir.Graph, cut: int, folder: Path) -> _Cut:
    early = _ancestors(node for node in graph if 0 <= _layer(node) < cut)
    moving = _depending(graph)
    crossing = []
    for node in graph:
        if node in early and node in moving:
            crossing += [v for v in node.outputs if any(u not in early for u, _ in v.uses())]
    # what was computed of ids alone (a mask, positions) is no state
    states = [value for value in crossing if _is_state(value, graph)]
    return _Cut(
        tuple(str(value.name) for value in crossing),
        tuple(str(value.name) for value in _summands(states, early, cut, folder)),
    )


def _summands(
    states: Sequence[ir.Value], early: set[ir.Node], cut: int, folder: Path
) -> Sequence[ir.Value]:
    """One state, or two that a norm of the next layer adds before anything else."""
    if len(states) == 1:
        return states
    readers = {node for value in states for node, _ in value.uses() if node not in early}
    if len(states) == 2 and len(readers) == 1 and next(iter(readers)).op_type == SKIP_NORM:
        return states
    raise ShortstackError(
        f"{folder / MODEL} hands more than a hidden state over after {cut} layers "
        f"({', '.join(str(value.name) for value in states)}). It cannot be cut there; use PyTorch."
    )


def _layer(node: ir.Node) -> int:
    """The layer of a node, by its names or its cache; -1 for none."""
    for value in (*node.inputs, *node.outputs):
        found = CACHE.match(str(value.name)) if value is not None else None
        if found:
            return int(found[2])
    named = layer_of(node)
    return -1 if named is None else named


def _ancestors(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes and all that they depend on."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            before = (value.producer() for value in node.inputs if value is not None)
            waiting += [one for one in before if one is not None]
    return found


def _depending(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that depend on the ids; others are computed again behind a cut."""
    found: set[ir.Node] = set()
    for node in graph:  # in order: what a node reads comes before it
        for value in node.inputs:
            if value is not None and (value.name == IDS or value.producer() in found):
                found.add(node)
    return found


def _is_state(value: ir.Value, graph: ir.Graph) -> bool:
    return value.dtype in (None, _dtype(graph)) and not CACHE.match(str(value.name))


def _dtype(graph: ir.Graph) -> Any:
    """The type of the activations: that of the cache."""
    return next(value.dtype for value in graph.inputs if CACHE.match(str(value.name)))


def _segment(
    file: Path, layers: tuple[int, int], before: _Cut | None, after: _Cut | None
) -> ir.Model:
    model = ir.load(file)
    graph = model.graph
    values = {str(v.name): v for node in graph for v in node.outputs if v.name}
    for name in before.crossing if before else ():
        _from_outside(graph, values[name])
    wanted = [
        values[f"present.{layer}.{kind}"]
        for layer in range(*layers)
        for kind in ("key", "value")
        if f"present.{layer}.{kind}" in values
    ]
    ends = [values[name] for name in after.crossing] if after else [values[LOGITS]]
    for value in ends:
        value.dtype = value.dtype or _dtype(graph)
    graph.outputs.clear()
    graph.outputs.extend([*ends, *wanted])
    RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    return model


def _from_outside(graph: ir.Graph, value: ir.Value) -> None:
    """Make an input of a value that another graph computes."""
    name = str(value.name)
    given = ir.Value(
        name=name,
        type=value.type or ir.TensorType(_dtype(graph)),
        shape=value.shape,
    )
    value.name = f"{name}{BEFORE}"
    ir.convenience.replace_all_uses_with(value, given)
    graph.inputs.append(given)
