"""The kernel of the packed form `direct` on a card, in all its configurations, against int8's.

    python -m benchmarks.direct_kernels [--shapes 4096x4096 11008x4096 4096x11008] [--sigma 4]
        [--minutes 3] [--json FILE]

Every configuration is printed as soon as it is timed: microseconds a product, by a CUDA graph over
so many matrices that no cache holds them; a table of what the runtime chooses and of the quickest
comes last. What a kernel computes is held against float64 first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.packed_card import STEP, gaussian_codes
from torch import Tensor

from shortstack.runtimes.packed import kernels
from shortstack.runtimes.packed.card import CardDirectMatrix, int8_product
from shortstack.runtimes.packed.card_times import replayed_s

BYTES = 1_200_000_000
"""Of all matrices together, several times a card's cache."""


def call(matrix: CardDirectMatrix, x: Tensor, config: Any) -> Tensor:
    """x, shape (1, columns), times one matrix, transposed."""
    y = x.new_empty(1, matrix.rows)
    kernels.direct_kernel.fn[(-(-matrix.rows // config.kwargs["ROWS"]), 1)](
        *(*matrix.arguments(x, y), *kernels.BITS_OF_FLOATS),
        **matrix.constants,
        **config.all_kwargs(),
    )
    return y


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
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
    found = off(int8_product(x, codes[0], steps), truth)
    config = str(kernels.int8_kernel.best_config)
    yield {**shape, "kernel": "int8", "us": us, "error": found, "config": config}
    del codes
    us = microseconds([partial(one.few, x) for one in matrices])
    found = off(matrices[0].few(x), truth)
    config = str(kernels.direct_kernel.best_config)
    yield {**shape, "kernel": "direct, as chosen", "us": us, "error": found, "config": config}
    for one in kernels.WORD_CONFIGS:
        line = {**shape, "kernel": "direct", "config": str(one)}
        yield line | tried(matrices, x, truth, one)


def tried(
    matrices: list[CardDirectMatrix], x: Tensor, truth: Tensor, config: Any
) -> dict[str, Any]:
    """Error and time of one configuration."""
    try:
        found = off(call(matrices[0], x, config), truth)
        us = microseconds([partial(call, matrix, x, config) for matrix in matrices])
        return {"us": us, "error": found}
    except Exception as error:  # noqa: BLE001  # a compiler's, whatever it is: the next may do
        return {"refused": repr(error)[:200]}


def every(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in asked.shapes:
        yield from timed(*sizes(shape), sigma=asked.sigma)


def sizes(shape: str) -> tuple[int, int]:
    rows, _, columns = shape.partition("x")
    return int(rows), int(columns)


def off(found: Tensor, truth: Tensor) -> float:
    """The largest error over the root mean square of the truth."""
    return float((found.double() - truth).abs().max() / truth.square().mean().sqrt())


def table(lines: list[dict[str, Any]]) -> str:
    """The quickest line of each kernel and shape."""
    best: dict[tuple[int, int, str], dict[str, Any]] = {}
    for line in lines:
        key = (line["rows"], line["columns"], line["kernel"])
        if "us" in line and line["us"] < best.get(key, {"us": float("inf")})["us"]:
            best[key] = line
    made = []
    for (rows, columns, name), line in best.items():
        int8 = best[rows, columns, "int8"]["us"]
        made.append(
            f"{rows:6}x{columns:<6} {name:18} {line['us']:7.2f} us {line['us'] / int8:6.3f} x int8 "
            f"{line['error']:.4f} off  {line['config']}"
        )
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shapes = ["11008x4096", "4096x4096", "4096x11008"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="ROWSxCOLUMNS")
    parser.add_argument("--sigma", type=float, default=4.0, help="of the codes, in steps")
    parser.add_argument("--minutes", type=float, default=3.0, help="after which nothing begins")
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
    print(table(lines))


if __name__ == "__main__":
    main()
