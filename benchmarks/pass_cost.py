"""What a pass of some tokens costs on a CPU, as PyTorch multiplies and in oneDNN's order.

    OMP_NUM_THREADS=1 python -m benchmarks.pass_cost MODEL [--held 32] [--repeats 15]

Verification of n drafts is a pass of n + 1 tokens. Medians of the process's time, all in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from shortstack.pretrained import load
from shortstack.runtimes.pytorch_drafters import logits_of, new_cache
from shortstack.runtimes.pytorch_onednn import reordered

TOKENS = (1, 2, 3, 4, 5)


def passes(model: Any, held: int) -> list[float]:
    """Seconds of passes behind `held` tokens, one for each of TOKENS."""
    found = []
    for count in TOKENS:
        cache = new_cache(model)
        logits_of(model, torch.ones((1, held), dtype=torch.long), cache)
        begun = time.process_time()
        logits_of(model, torch.ones((1, count), dtype=torch.long), cache, keep=0)
        found.append(time.process_time() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--held", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    model = load(args.model, torch.float32)
    orders: dict[str, Any] = {"PyTorch": contextlib.nullcontext, "oneDNN": lambda: reordered(model)}
    seconds: dict[str, list[list[float]]] = {name: [] for name in orders}
    with torch.inference_mode():
        for _ in range(args.repeats + 1):
            for name, order in orders.items():
                with order():
                    passes(model, args.held)  # the first products set kernels up
                    seconds[name].append(passes(model, args.held))
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:], strict=True)]
        for name, rows in seconds.items()
    }
    for name, row in medians.items():
        print(f"| {name} |", " | ".join(f"{s * 1e3:.1f} ({s / row[0]:.2f})" for s in row), "|")
    facts = {"tokens": TOKENS, "held": args.held, "threads": torch.get_num_threads()}
    print(json.dumps({**facts, "seconds": medians}))


if __name__ == "__main__":
    main()
