"""LLM-Streamline against no replacement, another replacement, and healing, at equal tokens.

    python -m benchmarks.streamline MODEL --data DIR --out OUT [--drop 8] [--tokens 2000000]
        [--kinds none layer:mse layer:lm swiglu:mse swiglu:lm heal:all heal:neighbours]
        [--devices cuda:0 cuda:1] [--jobs 4]

Every model is as deep as every other. Training text, selection text and test rows are those of
benchmarks/depth.py, whose folder OUT may be: sampled text and the opened model are shared.
Stability (LLM-Streamline, section 4) is weighted by how sure the full model was, over the rows of
three multiple-choice sets. One process and one JSON a kind, kept when the command is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.depth import (
    CALIBRATION,
    CHOICES,
    card_of,
    open_original,
    parts,
    score,
    training_windows,
    windows,
)
from benchmarks.sets import file_of

from shortstack.checkpoint import Checkpoint
from shortstack.prune import apply_plan
from shortstack.prune.heal.settings import HealSettings

KINDS = (
    *("none", "layer:mse", "layer:lm", "swiglu:mse", "swiglu:lm"),
    *("heal:all", "heal:neighbours", "heal:all:ce"),
)
WINDOW_TOKENS, SELECTION_WINDOWS = 512, 64


def rows_of(checkpoint: Checkpoint, asked: argparse.Namespace, device: str) -> dict[str, Any]:
    """Scored rows of the multiple-choice sets, to compare row by row."""
    from shortstack.evaluate.choice import score_choices
    from shortstack.evaluate.codec import FolderCodec
    from shortstack.evaluate.subsets import subset
    from shortstack.evaluate.torch_scorer import TorchScorer
    from shortstack.questions import open_questions

    found = {}
    codec = FolderCodec(checkpoint.path)
    with TorchScorer(checkpoint, device=device) as scorer:
        for name in CHOICES:
            file = file_of(asked.data, name, "test")
            questions = subset(open_questions(file), asked.limit, seed=0)
            found[name] = [r.to_dict() for r in score_choices(scorer, codec, questions)]
    return found


def train(
    kind: str, original: Checkpoint, asked: argparse.Namespace, work: Path
) -> tuple[Checkpoint, dict[str, Any]]:
    """The model of a kind in `work`, and the facts of its training."""
    from shortstack.prune.heal.train import heal
    from shortstack.prune.streamline import plan_run, streamline

    what, _, how = kind.partition(":")
    texts, (count, length) = parts(asked.data), CALIBRATION
    calibration = windows(original, texts["own"], length)[:count]
    selection = windows(original, texts["selection"])[:SELECTION_WINDOWS]
    healed = what in ("heal", "none")
    plan = plan_run(original, calibration, asked.drop, "none" if healed else what)
    train_on, _, loss = how.partition(":")
    settings = HealSettings(
        tokens=0 if what == "none" else asked.tokens,
        window_tokens=WINDOW_TOKENS,
        batch_windows=asked.batch,
        learning_rate=asked.rate,
        loss="ce" if loss == "ce" else "kl",
        train=train_on if what == "heal" else "all",
    )
    made = training_windows(asked, original)
    (work / "out").mkdir(parents=True)
    if healed:
        (work / "cut").mkdir()
        cut = apply_plan(original, plan, work / "cut")
        model, facts = heal(cut, original, made, selection, work / "out", settings)
    else:
        (work / "work").mkdir()
        model, facts = streamline(
            *(original, plan, made, selection, work / "work", work / "out", settings),
            objective=how,
        )
    return model, {**facts, "drop": list(plan.drop), "run": plan.facts["run"]}


def run_one(kind: str, asked: argparse.Namespace) -> None:
    import tempfile

    import torch

    from shortstack.evaluate.choice import compare

    torch.set_num_threads(asked.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = Checkpoint.open(asked.out / "model")
    with tempfile.TemporaryDirectory(dir=asked.out) as work:
        model, facts = (
            (original, {}) if kind == "full" else train(kind, original, asked, Path(work))
        )
        found = {"kind": kind, "training": facts, "scores": score(model, asked, device)}
        if kind != "full":
            pairs = zip(
                rows_of(original, asked, device).items(),
                rows_of(model, asked, device).values(),
                strict=True,
            )
            found["against_full"] = {name: compare(rows, mine) for (name, rows), mine in pairs}
    file(asked, kind).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def file(asked: argparse.Namespace, kind: str) -> Path:
    out: Path = asked.out
    return out / f"streamline-{kind.replace(':', '-')}-{asked.drop}.json"


def run_all(asked: argparse.Namespace) -> None:
    free: SimpleQueue[str] = SimpleQueue()
    for device in [d for d in asked.devices for _ in range(asked.jobs)]:
        free.put(device)

    def start(kind: str) -> None:
        device = free.get()
        shown = {"CUDA_VISIBLE_DEVICES": card_of(device)}
        words = [sys.executable, "-m", "benchmarks.streamline", *sys.argv[1:], "--one", kind]
        with file(asked, kind).with_suffix(".log").open("wb") as log:
            done = subprocess.run(words, env={**os.environ, **shown}, stdout=log, stderr=log)
        free.put(device)
        print(f"{kind}: exit {done.returncode}", file=sys.stderr, flush=True)

    wanted = [kind for kind in ("full", *asked.kinds) if not file(asked, kind).is_file()]
    with ThreadPoolExecutor(len(asked.devices) * asked.jobs) as pool:
        list(pool.map(start, wanted))


def table(asked: argparse.Namespace) -> None:
    print("| kind | selection | test | unseen |", " | ".join(CHOICES), "| stability | tokens/s |")
    print("|---" * (6 + len(CHOICES)) + "|")
    for kind in ("full", *asked.kinds):
        if not file(asked, kind).is_file():
            continue
        found = json.loads(file(asked, kind).read_text(encoding="utf-8"))
        scores, against = found["scores"], found.get("against_full", {})
        cells = [f"{scores[n]['estimate']:.1f}" for n in ("selection", "test", "unseen")]
        cells += [f"{100 * scores[n]['estimate']:.1f}" for n in CHOICES]
        stable = [100 * one["stability"] for one in against.values()]
        cells.append(f"{sum(stable) / len(stable):.1f}" if stable else "")
        cells.append(f"{found['training'].get('tokens_per_s') or 0:,.0f}")
        print(f"| {kind} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--sampled", type=int, default=1_400_000, help="of them sampled")
    parser.add_argument("--own-share", type=float, default=0.3)
    parser.add_argument("--own-repeats", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--jobs", type=int, default=1, help="processes on a device at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1000, help="rows or windows of a set")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.test = True
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.one:
        run_one(asked.one, asked)
        return
    open_original(asked.model, asked.out)
    run_all(asked)
    table(asked)


if __name__ == "__main__":
    main()
