"""Kernels for the packed form `direct` on a card, each against int8's, product by product.

    python -m benchmarks.direct_kernels [--shapes 4096x4096 11008x4096 4096x11008] [--sigma 4]
        [--minutes 3] [--json FILE]

`direct` is the kernel that the runtime has (runtimes/packed/kernels.py), in every configuration it
may choose; what else is tried is in tried_kernels.py: `registers` holds words that come early in
registers, `turns` has a shift less a word. Every configuration is printed as soon as it is timed:
microseconds a product, by a CUDA graph over so many matrices that no cache holds them; a table of
the quickest of each kernel comes last. What a kernel computes is held against float64 first. A
kernel that is faster here than `direct` belongs in its place.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.packed_card import STEP, gaussian_codes
from benchmarks.tried_kernels import registers_kernel, turns_kernel
from torch import Tensor

from shortstack.runtimes.packed import kernels
from shortstack.runtimes.packed.card import CardDirectMatrix, int8_product, turned
from shortstack.runtimes.packed.card_times import replayed_s

BYTES = 1_200_000_000
"""Of all matrices together, several times a card's cache."""


class Config(NamedTuple):
    rows: int
    words: int
    warps: int
    ahead: int
    pairs: int
    registers: int | None = None


class Tried(NamedTuple):
    kernel: Any
    turn: int
    """Of words, to the left of how the runtime holds them."""
    configs: Sequence[Config]


KERNELS = {
    "direct": Tried(
        kernels.direct_kernel.fn,
        0,
        [
            Config(
                *(one.kwargs["ROWS"], one.kwargs["COLS"], one.num_warps, one.kwargs["AHEAD"]),
                *(one.kwargs["PAIRS"], one.maxnreg),
            )
            for one in kernels.WORD_CONFIGS
        ],
    ),
    "turns": Tried(
        turns_kernel,
        28,
        [
            *(
                Config(4, 128, 1, 2, 64, 96),
                Config(4, 256, 2, 2, 64),
                Config(4, 256, 2, 2, 128, 96),
            ),
            *(Config(4, 512, 4, 2, 128, 64), Config(8, 512, 4, 2, 64, 128)),
        ],
    ),
    "registers": Tried(
        registers_kernel,
        0,
        [
            *(Config(4, 128, 1, 2, 128), Config(4, 256, 2, 2, 128), Config(4, 512, 4, 1, 128)),
        ],
    ),
}


def call(kernel: Any, matrix: CardDirectMatrix, words: Tensor, x: Tensor, config: Config) -> Tensor:
    """x, shape (1, columns), times one matrix whose words are `words`, transposed."""
    y = x.new_empty(1, matrix.rows)
    inputs, _, *others = matrix.arguments(x, y)
    more = {} if config.registers is None else {"maxnreg": config.registers}
    kernel[(-(-matrix.rows // config.rows), 1)](
        *(inputs, words, *others, *kernels.BITS_OF_FLOATS),
        **matrix.constants,
        ROWS=config.rows,
        COLS=config.words,
        AHEAD=config.ahead,
        PAIRS=config.pairs,
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
    found = off(int8_product(x, codes[0], steps), truth)
    config = str(kernels.int8_kernel.best_config)
    yield {**shape, "kernel": "int8", "us": us, "error": found, "config": config}
    del codes
    us = microseconds([partial(one.few, x) for one in matrices])
    found = off(matrices[0].few(x), truth)
    config = str(kernels.direct_kernel.best_config)
    yield {**shape, "kernel": "direct, as chosen", "us": us, "error": found, "config": config}
    for name, tried in KERNELS.items():
        words = [turned(one._words, tried.turn) if tried.turn else one._words for one in matrices]
        for one in tried.configs:
            line = {**shape, "kernel": name, "config": str(one)}
            yield line | tried_once(tried.kernel, matrices, words, x, truth, one)


def tried_once(
    kernel: Any,
    matrices: list[CardDirectMatrix],
    words: list[Tensor],
    x: Tensor,
    truth: Tensor,
    config: Config,
) -> dict[str, Any]:
    """Error and time of one configuration."""
    try:
        found = off(call(kernel, matrices[0], words[0], x, config), truth)
        calls = [
            partial(call, kernel, matrix, placed, x, config)
            for matrix, placed in zip(matrices, words, strict=True)
        ]
        return {"us": microseconds([*calls]), "error": found}
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
