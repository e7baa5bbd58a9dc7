"""Prompts of about one length as padded batches on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortstack.early_exit.checks import padded_answers
from shortstack.early_exit.prompts import Prompt

BATCH_TOKENS = {"cpu": 1, "cuda": 8192}
"""On a CPU one prompt at a time: more at once are no faster there, and filling up costs."""


@dataclass(frozen=True)
class Batch:
    """`index`: where its prompts stand in the list that was cut; tokens (rows, length), filled up
    at their right end, which a causal model never looks at; last: each row's last position;
    answers (rows, most), on the host, where they are read."""

    index: tuple[int, ...]
    tokens: Tensor
    last: Tensor
    answers: Tensor


def batches(prompts: Sequence[Prompt], device: Any, batch_tokens: int | None) -> Iterator[Batch]:
    """Short prompts first, at most `batch_tokens` padded tokens at once, but one prompt always."""
    room = batch_tokens or BATCH_TOKENS.get(torch.device(device).type, 1)
    waiting: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda at: (len(prompts[at].tokens), at)):
        if waiting and (len(waiting) + 1) * len(prompts[index].tokens) > room:
            yield _batch(prompts, waiting, device)
            waiting = []
        waiting.append(index)
    if waiting:
        yield _batch(prompts, waiting, device)


def _batch(prompts: Sequence[Prompt], index: Sequence[int], device: Any) -> Batch:
    rows = [prompts[at].tokens for at in index]
    tokens = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    last = torch.tensor([len(ids) - 1 for ids in rows])
    answers = padded_answers([prompts[at].answers for at in index])
    return Batch(tuple(index), tokens.to(device), last.to(device), answers)
