"""Perplexity after each method's cut, without repair, on text that the methods did not see.

    python -m benchmarks.choosing MODEL --text FILE [--drops 4 8 12 15] [--methods NAME ...]
        [--windows 8] [--length 128] [--test-windows 8] [--test-length 256] [--dtype auto]
        [--repair bias] [--screen 0] [--threads 1] [--out choosing-out]

Plans read the text's calibration part, perplexities its selection part. Each method plans once,
for the deepest cut, and its path or its scores give the others; runs and merges plan for each
count. Of sub-blocks twice the count goes. In brackets, with --repair: the same cut mended where it
ends (prune/boundary.py), fitted to the calibration windows; `linear` wants many more tokens than
the model is wide. Every finished method lies in the folder of --out and is not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.racing import windows as windows_of
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.families.table import PARTS
from shortstack.prune import METHODS, PrunePlan, apply_plan, planner
from shortstack.prune.boundary import REPAIRS, Repair, fitted, repair_named
from shortstack.prune.calibrate import LayerwiseModel, batches
from shortstack.prune.climb import Cut, climb, whole
from shortstack.prune.greedy import loss_under
from shortstack.prune.scoring import lowest
from shortstack.prune.sub_block import plan_of

FASTEST_FIRST = (
    *("every", "last", "random", "influence", "angular", "cosine-run", "taylor", "greedy"),
    *("repaired", "perplexity", "sub-block", "repaired-sub-block", "laco", "shapley"),
)
OPTIONS: dict[str, dict[str, Any]] = {"shapley": {"permutations": 2, "depth": 8}}
SCREENED = ("greedy", "repaired", "sub-block", "repaired-sub-block")
FOR_EACH_COUNT = ("angular", "cosine-run", "every", "laco", "last", "random")


def shallower(checkpoint: Checkpoint, plan: PrunePlan, count: int) -> PrunePlan:
    """The plan that the same method would make for a smaller count."""
    if METHODS[plan.method].sub_blocks:
        names = [step["drop"].split(".") for step in plan.facts["path"][: 2 * count]]
        return plan_of(
            checkpoint, plan.method, frozenset((int(layer), part) for layer, part in names), {}
        )
    if "path" in plan.facts:
        dropped = sorted(step["drop"] for step in plan.facts["path"][:count])
    else:
        dropped = sorted(lowest([None, *plan.scores[1:-1], None], count))
    return PrunePlan(plan.n_layers, tuple(dropped), plan.method)


def cut_of(plan: PrunePlan) -> Cut:
    alone = [(layer, PARTS[0]) for layer in plan.attention]
    return whole(*plan.drop).union(alone, ((layer, PARTS[1]) for layer in plan.mlp))


class Text:
    """The windows of both parts, and the model they are run through."""

    def __init__(self, checkpoint: Checkpoint, asked: argparse.Namespace) -> None:
        self.checkpoint, self.asked = checkpoint, asked
        self.windows = windows_of(
            checkpoint, asked.text, asked.length, asked.windows, "calibration"
        )
        test = windows_of(
            checkpoint, asked.text, asked.test_length, asked.test_windows, "selection"
        )
        self.calibration, self.test = batches(self.windows), batches(test)
        self.model = LayerwiseModel(checkpoint, asked.dtype)
        by_batch = [list(self.model.states(tokens)) for tokens in self.calibration]
        self.wanted = list(zip(*by_batch, strict=True))

    def cut(self, plan: PrunePlan) -> float:
        """Perplexity of the cut model; a merge is written and opened again."""
        if not plan.merge:
            return math.exp(loss_under(self.model, self.test, [cut_of(plan)])[0])
        with tempfile.TemporaryDirectory() as folder:
            merged = apply_plan(self.checkpoint, plan, Path(folder))
            model = LayerwiseModel(merged, self.asked.dtype)
            return math.exp(loss_under(model, self.test, [frozenset()])[0])

    def mended(self, plan: PrunePlan) -> float | None:
        """Perplexity with repairs, fitted from the bottom up on the calibration part."""
        if plan.merge or self.asked.repair == "none":
            return None
        how = repair_named(self.asked.repair)
        repairs: dict[int, Repair] = {}

        def fit(place: int, arriving: list[Tensor]) -> list[Tensor]:
            repairs[place] = fitted(how, arriving, self.wanted[place])
            return use(place, arriving)

        def use(place: int, arriving: list[Tensor]) -> list[Tensor]:
            return [repairs[place](states) for states in arriving]

        cut = cut_of(plan)
        climb(self.model, self.calibration, [cut], mend=fit)
        (ends,) = climb(self.model, self.test, [cut], mend=use)
        nats = sum(self.model.nats(h, t) for h, t in zip(ends, self.test, strict=True))
        return math.exp(nats / sum(tokens[:, 1:].numel() for tokens in self.test))


def measured(text: Text, method: str) -> dict[str, Any]:
    drops = sorted(text.asked.drops)
    given = text.windows if METHODS[method].needs_text else []
    plans: list[PrunePlan] = []
    begin = time.perf_counter()
    for count in drops if method in FOR_EACH_COUNT else drops[-1:]:
        pieces = 2 * count if METHODS[method].sub_blocks else count
        options = dict(OPTIONS.get(method, {}))
        if text.asked.screen is not None and method in SCREENED:
            options["screen"] = text.asked.screen
        plans.append(planner(method)(text.checkpoint, drop=pieces, windows=given, **options))
    spent = time.perf_counter() - begin
    evaluations = [plan.facts.get("layer_evaluations", 0) for plan in plans]
    if method not in FOR_EACH_COUNT:
        plans = [shallower(text.checkpoint, plans[0], count) for count in drops]
    with torch.inference_mode():
        cells = {
            str(count): {
                "cut": text.cut(plan),
                "mended": text.mended(plan),
                "drop": [plan.drop, plan.attention, plan.mlp],
            }
            for count, plan in zip(drops, plans, strict=True)
        }
    return {"cells": cells, "layer_evaluations": evaluations[-1], "seconds": round(spent)}


def table(done: dict[str, Any], drops: Sequence[int], whole_model: float) -> str:
    """Markdown; the whole model's perplexity in the head."""
    heads = [f"{count} dropped" for count in sorted(drops)]
    lines = [
        f"| method (whole: {whole_model:.1f}) | {' | '.join(heads)} | layer evaluations | s |",
        f"| --- | {' | '.join('---' for _ in heads)} | --- | --- |",
    ]
    for method, found in done.items():
        cells = [found["cells"][str(count)] for count in sorted(drops)]
        shown = [
            f"{cell['cut']:.1f}" + (f" ({cell['mended']:.1f})" if cell["mended"] else "")
            for cell in cells
        ]
        cost = f"{found['layer_evaluations']:.0f} | {found['seconds']}"
        lines.append(f"| `{method}` | {' | '.join(shown)} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--drops", type=int, nargs="+", default=[4, 8, 12, 15])
    parser.add_argument("--methods", nargs="+", default=FASTEST_FIRST, choices=FASTEST_FIRST)
    for name, default in (("windows", 8), ("length", 128), ("test-windows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--test-length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repair", default="none", choices=REPAIRS)
    parser.add_argument("--screen", type=int, help="of the methods that have it; 0 tries all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("choosing-out"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {}
    with torch.inference_mode():
        text = Text(Checkpoint.open(asked.model), asked)
        nothing = math.exp(loss_under(text.model, text.test, [frozenset()])[0])
    for method in asked.methods:
        file = asked.out / f"{method}.json"
        if not file.is_file():
            file.write_text(json.dumps(measured(text, method), indent=2), encoding="utf-8")
        done[method] = json.loads(file.read_text(encoding="utf-8"))
        print(method, done[method]["seconds"], "s", flush=True, file=sys.stderr)
    print(table(done, asked.drops, nothing))


if __name__ == "__main__":
    main()
