"""What a product of each matrix costs on a card: all of a kind in one graph, so that no launch and
no cache counts that decoding would not see."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from shortstack.runtimes.packed.matrix import Matrix

REPLAYS = 8
LAYER = re.compile(r"\.\d+\.")


def by_matrix(matrices: Mapping[str, Matrix]) -> dict[str, float]:
    """Seconds of one row times each matrix: the mean over its kind, which differs by layer alone.

    A table that is gathered from alone costs next to nothing, and counts as nothing.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in matrices:
        kinds[LAYER.sub(".*.", name)].append(name)
    found: dict[str, float] = {}
    for names in kinds.values():
        gathered = "embed" in names[0] and len(matrices) > 1 and _has_head(matrices)
        seconds = 0.0 if gathered else _mean_s([matrices[name] for name in names])
        found |= dict.fromkeys(names, seconds)
    return found


def _has_head(matrices: Mapping[str, Matrix]) -> bool:
    """Whether some matrix besides the embeddings has as many rows."""
    tables = [matrix.rows for name, matrix in matrices.items() if "embed" in name]
    others = [matrix.rows for name, matrix in matrices.items() if "embed" not in name]
    return any(rows in others for rows in tables)


def _mean_s(matrices: list[Matrix]) -> float:
    device = matrices[0].device
    with torch.inference_mode(), torch.cuda.device(device):
        inputs = [torch.randn(1, m.columns, device=device).to(m.dtype) for m in matrices]
        return replayed_s([partial(m.multiply, x) for m, x in zip(matrices, inputs, strict=True)])


def replayed_s(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one of these calls, all in one CUDA graph; in inference mode, on this device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / REPLAYS / len(calls)
