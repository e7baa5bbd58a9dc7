"""Cut a model at several depths, try every repair without training, print a Markdown table.

    python -m benchmarks.repairs MODEL --text TEXT [--unseen TEXT] [--cuts "4,16-18;3-5,15-18,25"]
        [--repairs bias,ghost] [--windows 32] [--length 256] [--dtype auto] [--threads 1]

Repairs are fitted on the calibration part of the text, kept or not on its selection part, and
measured on its test part as written to disk. `own MLP` is the control of a slot: the last layer
dropped at each gap stays without its attention, as large as a slot, and nothing is fitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.intake import open_model
from shortstack.prune import PrunePlan, apply_plan, parse_drop
from shortstack.prune.calibrate import batches
from shortstack.prune.repair import REPAIRS
from shortstack.prune.repair.boundaries import boundaries
from shortstack.prune.repair.drive import fit_all, selection_nats
from shortstack.prune.repair.fold import write_repaired
from shortstack.prune.repair.support import refusal
from shortstack.prune.scoring import perplexity
from shortstack.text import open_corpus
from shortstack.tokens import Encoder

CUTS = "4,16-18;3-5,16-18,25-26;3-6,12-18,23-26"


class Texts:
    """Windows of every part, and the perplexities of a checkpoint on those it was not fitted on."""

    def __init__(self, model: Checkpoint, text: str, unseen: str | None, asked: argparse.Namespace):
        self.dtype, self.repairs = asked.dtype, asked.repairs.split(",")
        encoder, corpus = Encoder(model), open_corpus(text)
        self.calibration = batches(encoder.windows(corpus.calibration, asked.length, asked.windows))
        few = max(1, asked.windows // 4)
        self.selection = batches(encoder.windows(corpus.selection, asked.length, few))
        self.measured = {"test": batches(encoder.windows(corpus.test, asked.length, few))}
        if unseen is not None:
            documents = open_corpus(unseen).test
            self.measured["unseen"] = batches(encoder.windows(documents, asked.length, few))

    def figures(self, checkpoint: Checkpoint) -> str:
        parts = self.measured.values()
        dtype = self.dtype
        return " | ".join(
            f"{_perplexity(selection_nats(checkpoint, p, dtype), p):.2f}" for p in parts
        )


def _perplexity(nats: float, parts: list[Tensor]) -> float:
    return perplexity(nats / sum(tokens[:, 1:].numel() for tokens in parts))


def one_cut(original: Checkpoint, drop: str, texts: Texts, work: Path) -> None:
    """Print the rows of one cut."""
    plan = PrunePlan(original.n_layers, parse_drop(drop), "explicit")
    folder = work / "cut"
    folder.mkdir(parents=True)
    cut = apply_plan(original, plan, folder)
    title = f"{len(plan.drop)} of {plan.n_layers}: {drop}"
    _row(title, "none", cut.n_layers, 0, texts.figures(cut), "")
    _own_mlp(original, plan, title, texts, work)
    refused = {name: refusal(cut, REPAIRS[name].kind) for name in texts.repairs}
    begin = time.perf_counter()
    (work / "fit").mkdir()
    attempts, before, _ = fit_all(
        original,
        cut,
        plan,
        texts.calibration,
        texts.selection,
        refused,
        work / "fit",
        texts.dtype,
        _quiet,
    )
    spent = time.perf_counter() - begin
    gaps = len(boundaries(plan))
    print(f"<!-- {title}: all repairs fitted in {spent:.0f} s; selection perplexity by gap:")
    for attempt in attempts:
        print(f"{attempt.name}: {_perplexity(attempt.nats, texts.selection):.2f}", *attempt.log)
    print("-->", flush=True)
    for attempt in attempts:
        if attempt.refused is not None or not math.isfinite(attempt.nats):
            print(f"| {title} | {attempt.name} | refused: {attempt.refused} |", flush=True)
            continue
        out = work / attempt.name
        out.mkdir()
        made, _ = write_repaired(original, cut, plan, attempt.maps, out)
        kept = f"{len(attempt.maps)} of {gaps}" if attempt.nats < before else "none kept"
        n_slots = made.n_layers - cut.n_layers
        _row(title, attempt.name, made.n_layers, n_slots, texts.figures(made), kept)


def _own_mlp(original: Checkpoint, plan: PrunePlan, title: str, texts: Texts, work: Path) -> None:
    stay = tuple(gap.dropped[-1] for gap in boundaries(plan) if gap.position)
    drop = tuple(layer for layer in plan.drop if layer not in stay)
    folder = work / "own-mlp"
    folder.mkdir()
    made = apply_plan(original, dataclasses.replace(plan, drop=drop, attention=stay), folder)
    _row(title, "own MLP", made.n_layers, len(stay), texts.figures(made), "")


def _row(cut: str, name: str, layers: int, slots: int, figures: str, kept: str) -> None:
    print(f"| {cut} | {name} | {layers} | {slots} | {figures} | {kept} |", flush=True)


def _quiet(done: int, total: int) -> None:
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="spdx")
    parser.add_argument("--unseen", help="a text of another kind, only measured on")
    parser.add_argument("--cuts", default=CUTS, help="layers to drop, cuts apart by ;")
    parser.add_argument("--repairs", default=",".join(REPAIRS), help="which, by commas")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="what the models compute in")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        original = open_model(asked.model, work / "model")
        texts = Texts(original, asked.text, asked.unseen, asked)
        columns = list(texts.measured)
        print(f"| cut | repair | layers | slots | {' | '.join(columns)} | gaps repaired |")
        print(f"|---|---|---:|---:|{'---:|' * len(columns)}---|")
        _row("nothing", "none", original.n_layers, 0, texts.figures(original), "")
        for number, drop in enumerate(asked.cuts.split(";")):
            one_cut(original, drop, texts, work / str(number))


if __name__ == "__main__":
    main()
