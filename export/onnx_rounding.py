"""Blocks of a weight matrix as 4- or 8-bit integers, rounded for the inputs they will meet."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.export.to_onnx import ROUNDED_AT_ONCE

Floats = NDArray[np.float32]
Codes = tuple[NDArray[np.uint8], Floats]
Stored = tuple[NDArray[np.uint8], NDArray[Any]]

HALF_NORMAL, HALF_STEP = np.float32(2.0**-14), np.float32(2.0**-24)
"""The smallest float16 that keeps 11 bits, and the distance of those below it."""

PART = 1 << 17
"""Weights that a thread rounds at a time: its arrays stay in the caches of a core."""
STEPS = (8.0, 7.0, 7.4, 7.8, 8.4, 8.8, 9.2)
"""Steps from zero to a block's largest weight that are tried. Eight is what rounding without
importance has, and comes first: it stays where nothing is better. More steps gain nothing: on
SmolLM2-135M, KL to float32: these 0.216, llama.cpp's 19 0.226, eight alone 0.371."""


def quantize_rows(
    table: NDArray[Any],
    block: int,
    bits: int,
    importance: Floats | None = None,
    *,
    half: bool = False,
) -> Stored:
    """Round each `block` of a row: w ≈ scale · (q - z), z = 2^(bits - 1).

    Without `importance` the scale is w* / -z: w*, the block's weight of largest magnitude, is
    exact. With it, one number a column, Σ importance · error² is made small (`_weighted`); 4 bits
    only. Returns codes (rows, blocks, block * bits / 8), two 4-bit codes to a byte, the first in
    the low half, and scales (rows, blocks), float16 if `half` (`_halve`), else float32.
    """
    rows, width = table.shape
    codes = np.empty((rows, width // block, block * bits // 8), np.uint8)
    scales = np.empty((rows, width // block), np.float16 if half else np.float32)
    weights = None if importance is None else _relative(importance).reshape(-1, block)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = threads or 1
    step = max(1, min(PART, ROUNDED_AT_ONCE // threads) // width)

    def work(begin: int) -> None:
        part = slice(begin, begin + step)
        blocks = np.ascontiguousarray(table[part], np.float32).reshape(-1, width // block, block)
        whole, exact = (
            _largest_exact(blocks, bits) if weights is None else _weighted(blocks, weights)
        )
        whole, scales[part] = _halve(blocks, whole, exact, bits) if half else (whole, exact)
        codes[part] = whole if bits == 8 else whole[..., ::2] | (whole[..., 1::2] << 4)

    with ThreadPoolExecutor(threads) as pool:  # numpy lets the others run while it computes
        for _ in pool.map(work, range(0, rows, step)):
            pass
    return codes, scales


def _relative(importance: Floats) -> Floats:
    """Against their mean: squares of float32 shall neither vanish nor overflow."""
    mean = float(importance.mean(dtype=np.float64)) or 1.0
    return (importance / mean).astype(np.float32)


def _peaks(blocks: Floats) -> Floats:
    """Each block's weight of largest magnitude, with its sign; the positive of two."""
    low, high = blocks.min(-1), blocks.max(-1)
    peaks: Floats = np.where(-low >= high, low, high)
    return peaks


def _largest_exact(blocks: Floats, bits: int) -> Codes:
    scales = _peaks(blocks) / np.float32(-(1 << (bits - 1)))
    return _nearest(blocks, scales, bits), scales


def _nearest(blocks: Floats, scales: Floats, bits: int) -> NDArray[np.uint8]:
    zero = 1 << (bits - 1)
    safe = np.where(scales == 0, np.float32(1), scales)
    steps = np.rint(blocks / safe[..., None]) + np.float32(zero)
    return np.clip(steps, 0, 2 * zero - 1).astype(np.uint8)


def _halve(blocks: Floats, whole: NDArray[np.uint8], scales: Floats, bits: int) -> Stored:
    """Scales as float16, and codes that are right for them; infinity for a scale beyond it.

    A normal float16 is off by 2^-11 at most, 2^(bits - 12) steps at the largest code: the codes
    stay (8 bits, normally distributed weights: the error grows by 8e-4 of itself). Smaller scales
    have fewer bits: they go up to the next float16, so that no weight is out of reach nor any
    block lost, and the codes are rounded anew.
    """
    with np.errstate(over="ignore"):
        stored = scales.astype(np.float16)
    small = (np.abs(scales) < HALF_NORMAL) & (scales != 0)
    if small.any():
        upward = np.ceil(np.abs(scales[small]) / HALF_STEP) * HALF_STEP
        rounded = np.copysign(upward, scales[small]).astype(np.float32)
        whole = whole.copy()
        whole[small] = _nearest(blocks[small], rounded, bits)
        stored[small] = rounded.astype(np.float16)
    return whole, stored


def _weighted(blocks: Floats, weights: Floats) -> Codes:
    """Codes and scales of 4 bits with a small Σ c (w - s q)², c the weights.

    For each of STEPS, f, the codes q are those of the scale w* / -f. With the rest r = f u - q,
    u = w / -w*, the best scale for these codes is -w* / f · (1 + Σ c r q / Σ c q²), and leaves, in
    units of w*², the error (Σ c r² - (Σ c r q)² / Σ c q²) / f². Least squares as in llama.cpp's
    make_qx_quants (ggml-quants.c), written by rests so that float32 tells small errors apart.
    """
    peaks, one = _peaks(blocks), np.float32(1)
    flipped: Floats = np.where(peaks == 0, one, -peaks)
    units: Floats = blocks / flipped[..., None]
    rest, weighed = np.empty_like(units), np.empty_like(units)
    for f in map(np.float32, STEPS):
        np.multiply(units, f, out=rest)
        found = np.clip(np.rint(rest), np.float32(-8), np.float32(7))
        whole = found.astype(np.int8)
        np.subtract(rest, found, out=rest)
        np.multiply(rest, weights, out=weighed)
        match = np.einsum("rnb,rnb->rn", weighed, found)
        error = np.einsum("rnb,rnb->rn", weighed, rest)
        size = np.einsum("rnb,nb->rn", np.square(found, out=found), weights)
        share = match / np.where(size > 0, size, one)  # without codes that count: nothing to fit
        error, scale = (error - share * match) / (f * f), (one + share) / f
        if f == STEPS[0]:
            codes, scales, least = whole, scale, error
            continue
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scales, scale, where=better)
        np.copyto(codes, whole, where=better[..., None])
    return (codes + 8).astype(np.uint8), np.where(peaks == 0, np.float32(0), scales * flipped)
