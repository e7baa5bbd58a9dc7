"""Kernels for the packed form `direct` on a card, each against int8's, product by product.

    python -m benchmarks.direct_kernels [--shapes 4096x4096 11008x4096 4096x11008] [--sigma 4]
        [--minutes 5] [--json FILE]

`direct` is the kernel that the runtime has (runtimes/packed/kernels.py); `fewer-shifts` puts five
of a word's nibbles where they need none or share one; `dot` lets tensor cores multiply and adds.
Every configuration is printed as soon as it is timed: microseconds a product, by a CUDA graph over
so many matrices that no cache holds them. What a kernel computes is held against float64 first.
A kernel that is faster here than `direct` belongs in its place.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.packed_card import STEP, gaussian_codes
from benchmarks.tried_kernels import PLACES, dot_kernel, shifts_kernel
from torch import Tensor

from shortstack.runtimes.packed import kernels
from shortstack.runtimes.packed.card import COLUMN_BITS, CardDirectMatrix, int8_product
from shortstack.runtimes.packed.card_times import replayed_s

BYTES = 1_200_000_000
"""Of all matrices together, several times a card's cache."""


@dataclass(frozen=True)
class Config:
    rows: int
    words: int
    warps: int
    stages: int = 1


BY_SHIFTS = tuple(
    Config(*one)
    for one in (
        *((4, 256, 2), (4, 128, 1), (8, 256, 2), (2, 128, 1), (2, 256, 2), (8, 256, 4)),
        *((4, 512, 4), (8, 128, 4), (1, 512, 2)),
    )
)
BY_DOTS = tuple(
    Config(*one)
    for one in (
        *((16, 64, 1, 3), (16, 64, 2, 4), (32, 64, 2, 3), (32, 64, 2, 4), (32, 128, 2, 3)),
        *((16, 128, 1, 3), (16, 128, 2, 4), (64, 64, 4, 3), (64, 64, 4, 4), (32, 32, 2, 5)),
    )
)


def fewer_shifts(matrix: CardDirectMatrix) -> Tensor:
    """The words of a matrix with its nibbles at PLACES."""
    words = matrix._words
    made = torch.zeros_like(words)
    for k, place in enumerate(PLACES):
        nibble = (words >> (4 * k)) & 15
        made |= (nibble << 31) | (nibble >> 1) if place == 31 else nibble << place
    return made


def call(kernel: Any, matrix: CardDirectMatrix, words: Tensor, x: Tensor, config: Config) -> Tensor:
    """x, shape (1, columns), times one matrix, transposed."""
    y = x.new_empty(1, matrix.rows)
    more = {"STAGES": config.stages} if kernel is dot_kernel else {}
    kernel[(-(-matrix.rows // config.rows),)](
        *(x, words, matrix._entries, matrix._starts, matrix.steps, y),
        *(matrix.rows, matrix.columns, words.shape[1]),
        BLOCKS=matrix._blocks,
        BITS=COLUMN_BITS,
        AT=matrix._at_once,
        ROWS=config.rows,
        COLS=config.words,
        num_warps=config.warps,
        **more,
    )
    return y


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, the least of three times."""
    return min(1e6 * replayed_s(calls) for _ in range(3))


def timed(rows: int, columns: int, *, sigma: float) -> Iterator[dict[str, Any]]:
    """A line for every kernel and configuration of a shape."""
    device = torch.device("cuda:0")
    count = max(4, BYTES // (rows * columns))
    codes = [gaussian_codes(rows, columns, device, sigma) for _ in range(count)]
    steps = torch.full((rows,), STEP, device=device)
    x = torch.randn(1, columns, device=device).bfloat16()
    truth = (x.double() @ codes[0].double().T) * STEP
    matrices = [CardDirectMatrix.of(one, steps, torch.bfloat16) for one in codes]
    shape = {"rows": rows, "columns": columns}
    us = microseconds([partial(int8_product, x, one, steps) for one in codes])
    yield {**shape, "kernel": "int8", "us": us, "config": str(kernels.int8_kernel.best_config)}
    del codes
    us = microseconds([partial(one.few, x) for one in matrices])
    config = str(kernels.direct_kernel.best_config)
    yield {**shape, "kernel": "direct", "us": us, "error": off(matrices[0].few(x), truth)} | {
        "config": config
    }
    moved = [fewer_shifts(one) for one in matrices]
    plain = [one._words for one in matrices]
    for name, kernel, words, configs in (
        ("dot", dot_kernel, plain, BY_DOTS),
        ("fewer-shifts", shifts_kernel, moved, BY_SHIFTS),
    ):
        for one in configs:
            line = {**shape, "kernel": name, "config": str(one)}
            try:
                found = off(call(kernel, matrices[0], words[0], x, one), truth)
                us = microseconds(
                    [
                        partial(call, kernel, matrix, placed, x, one)
                        for matrix, placed in zip(matrices, words, strict=True)
                    ]
                )
            except Exception as error:  # noqa: BLE001  # a compiler's, whatever it is: the next may do
                yield {**line, "refused": repr(error)[:200]}
            else:
                yield {**line, "us": us, "error": found}


def every(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in asked.shapes:
        yield from timed(*sizes(shape), sigma=asked.sigma)


def sizes(shape: str) -> tuple[int, int]:
    rows, _, columns = shape.partition("x")
    return int(rows), int(columns)


def off(found: Tensor, truth: Tensor) -> float:
    """The largest error over the root mean square of the truth."""
    return float((found.double() - truth).abs().max() / truth.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shapes = ["11008x4096", "4096x4096", "4096x11008"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="ROWSxCOLUMNS")
    parser.add_argument("--sigma", type=float, default=4.0, help="of the codes, in steps")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which nothing begins")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    until = time.monotonic() + 60 * asked.minutes
    lines = []
    with torch.inference_mode():
        for line in every(asked):
            print(json.dumps(line), flush=True)
            lines.append(line)
            if time.monotonic() > until:
                break
    if asked.json:
        asked.json.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
