"""What a cut costs and what brings it back: method x depth x {as cut, repaired, healed}.

    python -m benchmarks.depth MODEL --data DIR --out OUT [--methods repaired greedy influence]
        [--depths 4 8 12 15] [--tokens 5000000] [--rate 1e-3] [--sampled 3000000]
        [--states cut repaired healed] [--devices cuda:0 cuda:1] [--jobs 2] [--test]

Layers are chosen, repaired and healed on three quarters of WikiText-2's validation articles, on
train rows of other sets, and on text that the full model samples itself; what is kept is chosen on
the last quarter. `--test` then scores every state once on the test articles, on text of another
kind that nothing was fitted on (LAMBADA), and on three multiple-choice sets. Each cell is one JSON
in OUT, kept when the command is run again; the table is made of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from benchmarks.sets import file_of
from safetensors.numpy import load_file, save_file

from shortstack.checkpoint import Checkpoint
from shortstack.intake import open_model
from shortstack.prune import apply_plan, planner
from shortstack.prune.heal.data import packed_windows
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.plan import PrunePlan
from shortstack.tokens import Encoder

LENGTH = 512
CALIBRATION = (16, 256)
"""Windows and tokens on which layers are chosen."""
BEGINNING = 32
"""Tokens of training text that the full model goes on from."""
GPU_BATCH = 1536
"""Windows sampled at once: a small model leaves a GPU idle with fewer."""
GENERAL = ("legal/contracts_text", "general/tinyshakespeare", "finance/finqa", "general/gsm8k")
CHOICES = ("science/arc_easy", "general/piqa", "general/hellaswag")
UNSEEN = "general/lambada"
T = TypeVar("T")
STATES = ("cut", "repaired", "healed")


def documents(data: Path, name: str, split: str) -> list[str]:
    from shortstack.evaluate.perplexity import open_documents

    return sorted(open_documents(file_of(data, name, split)), key=_order)


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parts(data: Path) -> dict[str, list[str]]:
    """Documents to fit on and to choose on, disjoint; test rows are opened by `score` alone."""
    own = documents(data, "general/wikitext2", "validation")
    quarter = len(own) // 4
    general = [text for name in GENERAL for text in documents(data, name, "train")]
    return {"selection": own[:quarter], "own": own[quarter:], "general": general}


def windows(checkpoint: Checkpoint, texts: list[str], length: int = LENGTH) -> list[list[int]]:
    return packed_windows(texts, Encoder(checkpoint).encode, length)


def sample(
    asked: argparse.Namespace, original: Checkpoint, device: str, number: int, of: int
) -> None:
    """Write this process's share of what the full model makes of beginnings of training text."""
    from shortstack.prune.heal.sample import sampled_windows

    texts = parts(asked.data)
    beginnings = windows(original, texts["own"], BEGINNING) + windows(
        original, texts["general"], BEGINNING
    )
    random.Random(1).shuffle(beginnings)
    places = range(number, asked.sampled // LENGTH, of)
    mine = [beginnings[at % len(beginnings)] for at in places]
    batch = GPU_BATCH if device == "cuda" else None
    made = sampled_windows(original, mine, LENGTH, len(mine), seed=number, batch=batch)
    save_file({"tokens": np.array(made, np.int32)}, asked.out / f"sampled-{number}.safetensors")


def training_windows(asked: argparse.Namespace, checkpoint: Checkpoint) -> list[list[int]]:
    """One budget of windows: own text repeated to its share, sampled text, general text."""
    texts = parts(asked.data)
    own, general = windows(checkpoint, texts["own"]), windows(checkpoint, texts["general"])
    made: list[list[int]] = []
    for file in sorted(asked.out.glob("sampled-*.safetensors")):
        made += load_file(file)["tokens"].tolist()
    wanted = asked.tokens // LENGTH
    made = made[: asked.sampled // LENGTH]
    n_own = min(round(asked.own_share * wanted), asked.own_repeats * len(own))
    rest = [*made, *general][: wanted - n_own]
    chosen = [own[at % len(own)] for at in range(wanted - len(rest))] + rest
    random.Random(0).shuffle(chosen)
    return chosen


def score(checkpoint: Checkpoint, asked: argparse.Namespace, device: str) -> dict[str, Any]:
    """Selection figures; with --test those of the test rows, too."""
    from shortstack.evaluate import metrics
    from shortstack.evaluate.choice import score_choices
    from shortstack.evaluate.codec import FolderCodec
    from shortstack.evaluate.subsets import subset
    from shortstack.evaluate.torch_scorer import TorchScorer
    from shortstack.questions import open_questions

    found: dict[str, Any] = {}
    with TorchScorer(checkpoint, device=device) as scorer:
        texts = {"selection": parts(asked.data)["selection"]}
        if asked.test:
            texts["test"] = documents(asked.data, "general/wikitext2", "test")
            texts["unseen"] = documents(asked.data, UNSEEN, "test")
        for name, rows in texts.items():
            scored = scorer.nats(windows(checkpoint, rows)[: asked.limit])
            nats, counts = [s.sum_nats for s in scored], [s.n_tokens for s in scored]
            found[name] = metrics.perplexity(nats, counts).to_dict()
        codec = FolderCodec(checkpoint.path)
        for name in CHOICES if asked.test else ():
            file = file_of(asked.data, name, "test")
            asked_rows = score_choices(
                scorer, codec, subset(open_questions(file), asked.limit, seed=0)
            )
            right = sum(row.right_by_length for row in asked_rows)
            found[name] = {
                **metrics.wilson(right, len(asked_rows)).to_dict(),
                "n": len(asked_rows),
            }
    return found


def on(device: str, work: Callable[[], T]) -> T:
    """Run what knows no device on one, by torch's default; on the CPU where that fails."""
    import torch

    try:
        torch.set_default_device(device)
        return work()
    except (RuntimeError, TypeError) as error:
        print(f"not on {device}: {error}", file=sys.stderr, flush=True)
        torch.set_default_device("cpu")
        return work()
    finally:
        torch.set_default_device("cpu")


def cell(asked: argparse.Namespace, method: str, depth: int) -> None:
    """One method at one depth, in a process of its own with one device."""
    import torch

    from shortstack.prune.heal.train import heal
    from shortstack.prune.repair import repair

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(asked.threads)
    original, work = Checkpoint.open(asked.out / "model"), asked.out / f"{method}-{depth}"
    shutil.rmtree(work, ignore_errors=True)
    texts, seconds = parts(asked.data), {}
    count, length = CALIBRATION
    calibration = windows(original, texts["own"], length)[:count]
    selection = windows(original, texts["selection"])
    began = time.perf_counter()
    plan_file = asked.out / f"plan-{method}-{depth}.json"
    if plan_file.is_file():
        plan = PrunePlan.from_json(plan_file.read_text(encoding="utf-8"))
    else:
        plan = on(device, lambda: planner(method)(original, drop=depth, windows=calibration))
        plan_file.write_text(plan.to_json(), encoding="utf-8")
    seconds["choose"] = time.perf_counter() - began
    found: dict[str, Any] = {"method": method, "depth": depth, "drop": list(plan.drop)}
    states = {"cut": apply_plan(original, plan, _empty(work / "cut"))}
    if "repaired" in asked.states:
        began = time.perf_counter()
        given = (original, states["cut"], plan, windows(original, texts["own"], 256)[:32])
        states["repaired"], facts = on(
            device,
            lambda: repair(*given, selection[:24], _empty(work / "repaired"), method=asked.repair),
        )
        seconds["repair"] = time.perf_counter() - began
        found["repair"] = facts
    if "healed" in asked.states:
        settings = HealSettings(
            tokens=asked.tokens,
            window_tokens=LENGTH,
            batch_windows=asked.batch,
            learning_rate=asked.rate,
            loss="kl",
            device="auto",
            train=asked.train,
        )
        states["healed"], found["heal"] = heal(
            states[asked.heal_from],
            original,
            training_windows(asked, original),
            selection[:64],
            _empty(work / "healed"),
            settings,
        )
    for name, checkpoint in states.items():
        found[name] = score(checkpoint, asked, device)
    found["seconds"] = seconds
    if not asked.keep:
        shutil.rmtree(work)
    _write(asked.out / f"cell-{method}-{depth}.json", found)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write(file: Path, data: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
    partial.rename(file)


def run_all(asked: argparse.Namespace, tasks: list[list[str]]) -> None:
    """Run commands in processes, `jobs` on each device at a time."""
    free = [device for device in asked.devices for _ in range(asked.jobs)]
    running: list[tuple[subprocess.Popen[bytes], str, list[str]]] = []
    while tasks or running:
        while tasks and free:
            device, task = free.pop(0), tasks.pop(0)
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card_of(device)}
            words = [sys.executable, "-m", "benchmarks.depth", *sys.argv[1:], "--task", *task]
            log = (asked.out / f"log-{'-'.join(task)}.txt").open("wb")
            running.append(
                (subprocess.Popen(words, env=environment, stdout=log, stderr=log), device, task)
            )
        for process, device, task in list(running):
            if process.poll() is not None:
                running.remove((process, device, task))
                free.append(device)
                print(f"{' '.join(task)}: exit {process.returncode}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def card_of(device: str) -> str:
    """CUDA_VISIBLE_DEVICES of a child: numbers count in what this process itself may see."""
    if device == "cpu":
        return ""
    number, seen = device.removeprefix("cuda:"), os.environ.get("CUDA_VISIBLE_DEVICES")
    return number if seen is None else seen.split(",")[int(number)]


def open_original(model: str, out: Path) -> None:
    """Have the model as OUT/model, a folder, or a link where it is a folder elsewhere."""
    if not (out / "model" / "config.json").is_file():
        opened = open_model(model, out / "model")
        if opened.path != out / "model":
            (out / "model").symlink_to(opened.path.resolve())


def table(asked: argparse.Namespace) -> None:
    file = asked.out / "full.json"
    rows = [("full model", "", json.loads(file.read_text(encoding="utf-8")))]
    for method in asked.methods:
        for depth in asked.depths:
            file = asked.out / f"cell-{method}-{depth}.json"
            if file.is_file():
                found = json.loads(file.read_text(encoding="utf-8"))
                rows += [
                    (f"{method}, {depth} dropped", state, found[state])
                    for state in STATES
                    if state in found
                ]
    names = [name for name in rows[0][2]]
    print("| | | " + " | ".join(names) + " |")
    print("|---|---|" + "---:|" * len(names))
    for title, state, found in rows:
        figures = []
        for name in names:
            one = found[name]
            text = f"{one['estimate']:.2f}" if "n" not in one else f"{100 * one['estimate']:.1f} %"
            ratio = one["estimate"] / rows[0][2][name]["estimate"]
            figures.append(f"{text} ({ratio:.2f} x)" if state and "n" not in one else text)
        print(f"| {title} | {state} | {' | '.join(figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["repaired", "greedy", "influence"])
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 8, 12, 15])
    parser.add_argument("--tokens", type=int, default=5_000_000, help="a student sees in healing")
    parser.add_argument("--sampled", type=int, default=3_000_000, help="of them sampled")
    parser.add_argument("--own-share", type=float, default=0.3)
    parser.add_argument("--own-repeats", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--train", default="all")
    parser.add_argument("--repair", default="folded")
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--heal-from", choices=STATES[:2], default="cut")
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--jobs", type=int, default=1, help="processes on a device at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1000, help="rows or windows of a set")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints")
    parser.add_argument("--test", action="store_true", help="score the test rows")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.task:
        run_task(asked)
        return
    open_original(asked.model, asked.out)
    shares = len(asked.devices) if asked.sampled else 0
    first = [["sample", str(n), str(shares)] for n in range(shares)]
    run_all(asked, [t for t in first if not (asked.out / f"sampled-{t[1]}.safetensors").is_file()])
    tasks = [] if (asked.out / "full.json").is_file() else [["full"]]
    # the deepest cuts first: with the shortest last, no device waits long at the end
    for depth in sorted(asked.depths):
        for method in asked.methods:
            if not (asked.out / f"cell-{method}-{depth}.json").is_file():
                tasks.append(["cell", method, str(depth)])
    run_all(asked, tasks)
    table(asked)


def run_task(asked: argparse.Namespace) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = Checkpoint.open(asked.out / "model")
    kind, *words = asked.task
    if kind == "cell":
        cell(asked, words[0], int(words[1]))
    elif kind == "full":
        _write(asked.out / "full.json", score(original, asked, device))
    else:
        sample(asked, original, device, *map(int, words))


if __name__ == "__main__":
    main()
