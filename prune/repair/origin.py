"""Whether a cut was made of the model that is named: from headers, then from the embeddings."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune.plan import PrunePlan

ALIKE = 0.5
"""Least cosine of the embeddings of a model and of what was made of it, trained on or not."""


def check_sizes(
    original: Checkpoint, pruned: Checkpoint, plan: PrunePlan, name: str | None = None
) -> None:
    """Raise ShortstackError where `plan` cannot have made `pruned` out of a model of the sizes of
    `original`, of which only the headers are looked at. `name`: what the user calls it."""
    whole, left = dict(original.dims), dict(pruned.dims)
    fits = (whole.pop("layers"), left.pop("layers")) == (plan.n_layers, len(plan.keep))
    if not fits or (whole, original.family) != (left, pruned.family):
        raise _not_made_of(pruned, name or str(original.path))


def check_made_of(original: Checkpoint, pruned: Checkpoint, plan: PrunePlan) -> None:
    """Raise ShortstackError unless `plan` can have made `pruned` out of `original`."""
    check_sizes(original, pruned, plan)
    if _embedding_cosine(original, pruned) <= ALIKE:
        raise _not_made_of(pruned, str(original.path))


def _not_made_of(pruned: Checkpoint, name: str) -> ShortstackError:
    return ShortstackError(
        f"{pruned.path} was not made of {name}: sizes, layers or embeddings differ. "
        "Name the model that was cut with --of."
    )


def _embedding_cosine(first: Checkpoint, second: Checkpoint) -> float:
    """Of the first rows of both embeddings; training moves them little, another seed far."""
    import numpy as np

    from shortstack.floats import from_stored
    from shortstack.shards import ShardReader

    name, rows = first.family.outer[0].hf, []
    for checkpoint in (first, second):
        info = checkpoint.tensors[name]
        with ShardReader(checkpoint) as reader:
            stored = reader.read(name, 0, min(info.n_bytes, 2**20))
        rows.append(from_stored(stored, info.dtype).astype(np.float64))
    size = min(len(row) for row in rows)  # one may be stored wider
    a, b = (row[:size] for row in rows)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0
