"""Rows as padded batches: inputs that are equal, or begin another, run once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.prune.trim.rows import Row

if TYPE_CHECKING:
    from torch import Tensor

Inputs = tuple[tuple[int, ...], list[tuple[int, Row]]]
"""Ids to run, with (number of the choice, its row) for all that is read off them."""


@dataclass(frozen=True)
class Batch:
    """Padded ids (rows, length); what is read at (row, position): a target of a choice."""

    tokens: Tensor
    real: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    choice: Tensor


def packed(rows: Sequence[Row], n_tokens: int | None = None) -> list[list[Inputs]]:
    """Unique inputs in length-sorted batches, each with the rows that are read off it.

    An input that begins another is read off that one. A batch holds `n_tokens` padded ids at most;
    None puts all in one.
    """
    readers: dict[tuple[int, ...], list[tuple[int, Row]]] = {}
    for choice, row in enumerate(rows):
        readers.setdefault(row.inputs, []).append((choice, row))
    ordered = sorted(readers)
    for shorter, longer in itertools.pairwise(ordered):
        # Sorted, an input that begins others stands right before the first of them.
        if longer[: len(shorter)] == shorter:
            readers[longer] += readers.pop(shorter)
    batches: list[list[Inputs]] = [[]]
    for inputs in sorted(readers, key=lambda inputs: (len(inputs), inputs)):
        if n_tokens and batches[-1] and (len(batches[-1]) + 1) * len(inputs) > n_tokens:
            batches.append([])
        batches[-1].append((inputs, readers[inputs]))
    return batches


def batch_of(part: Sequence[Inputs], device: Any) -> Batch:
    """`choice` counts as `packed` did."""
    import torch

    length = max(len(inputs) for inputs, _ in part)
    tokens = torch.zeros(len(part), length, dtype=torch.long)
    real = torch.zeros(len(part), length, dtype=torch.bool)
    reads = []
    for number, (inputs, readers) in enumerate(part):
        tokens[number, : len(inputs)] = torch.tensor(inputs)
        real[number, : len(inputs)] = True
        for choice, row in readers:
            for offset, target in enumerate(row.answer):
                reads.append((number, len(row.prompt) - 1 + offset, target, choice))
    columns = torch.tensor(reads, device=device).T
    return Batch(tokens.to(device), real.to(device), *columns)
