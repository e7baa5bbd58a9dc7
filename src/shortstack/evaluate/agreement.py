"""KL divergence and top-1 agreement with a reference model, over windows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError
from shortstack.evaluate import metrics
from shortstack.evaluate.scorer import Scorer
from shortstack.progress import OnProgress, silent

WINDOWS = 8
"""Windows compared: each position costs a vocabulary of numbers."""
REFERENCE_BYTES = 512 * 2**20
"""Disk that the reference's distributions may take while models are held against them."""


def write_reference(
    scorer: Scorer, windows: Sequence[list[int]], file: Path, progress: OnProgress = silent
) -> None:
    """Write log probabilities, float32 (windows, positions, vocabulary), at every few positions."""
    made: NDArray[np.float32] | None = None
    for index, window in enumerate(windows):
        rows = scorer.log_probs(window)
        if made is None:
            n_bytes = len(windows) * rows.nbytes
            stride = math.ceil(n_bytes / REFERENCE_BYTES)
            shape = (len(windows), math.ceil(len(window) / stride), rows.shape[1])
            made = np.lib.format.open_memmap(file, "w+", np.float32, shape)
        stride = math.ceil(len(window) / made.shape[1])
        made[index] = rows[::stride]
        progress(index + 1, len(windows))
    if made is not None:
        made.flush()  # type: ignore[attr-defined]  # a memmap, which the annotation hides


def agreement(
    scorer: Scorer, windows: Sequence[list[int]], file: Path, progress: OnProgress = silent
) -> list[dict[str, Any]]:
    """One row a window: positions, their summed KL from the reference, how many tops are the same.

    Raises ShortstackError for a model with another vocabulary.
    """
    reference = np.load(file, mmap_mode="r")
    rows = []
    for index, window in enumerate(windows):
        found = scorer.log_probs(window)
        if found.shape[1] != reference.shape[2]:
            raise ShortstackError(
                f"the models have vocabularies of {reference.shape[2]} and {found.shape[1]} "
                "tokens: no KL can be had. Leave --against away."
            )
        stride = math.ceil(len(window) / reference.shape[1])
        told = np.asarray(reference[index])
        mine = found[::stride]
        rows.append(
            {
                "n": len(mine),
                "kl_nats": float(metrics.kl_divergence(told, mine).sum()),
                "same_top": int((told.argmax(-1) == mine.argmax(-1)).sum()),
            }
        )
        progress(index + 1, len(windows))
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean KL in nats a token and share of positions with the same top token; intervals over
    windows."""
    counts = [row["n"] for row in rows]
    return {
        "n_windows": len(rows),
        "n_positions": sum(counts),
        "kl_nats": metrics.ratio_of_sums([row["kl_nats"] for row in rows], counts).to_dict(),
        "same_top": metrics.ratio_of_sums([row["same_top"] for row in rows], counts).to_dict(),
    }
