"""TrimLLM against the full fine-tune of the same budget and against dropping all at once.

    python benchmarks/trim.py MODEL --data DIR [--sets finance/financial_phrasebank ...]
        [--seeds 0 1 2] [--modes full progressive one-shot] [--set ratio=1 score=scan ...]
        [--devices cuda:0 cuda:1] [--jobs 4] [--limit ROWS] [--units 60] [--name NAME] [--out OUT]

DIR holds DOMAIN/SET/{train,validation,test}.jsonl[.gz] with questions. Tuned on train, scanned on
150 rows of validation, tested once on test. A set without train divides its validation once, one
with fewer than 100 validation rows gives the rest from train; contexts are left out where the test
rows have none. Off-domain sets that DIR lacks are left out. Each run is a process of its own and
writes OUT/NAME.SET.MODE.SEED.json; one that is there is kept, and the table is made of all that are
there. `--set` changes any field of Settings. All modes tune on the same number of rows. `--jobs`
runs share a device. Where MODEL was cut before, `--units` says how many sub-blocks it had: the
shares of `--keep` and of the table are shares of those.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from shortstack.questions import Question, open_questions

if TYPE_CHECKING:
    from shortstack.prune.trim.loop import Trimmed
    from shortstack.prune.trim.rows import Parts
    from shortstack.prune.trim.settings import Settings

SETS = (
    "finance/financial_phrasebank",
    "legal/overruling",
    "medical/pubmedqa",
    "science/arc_easy",
    "science/sciq",
)
OFF_DOMAIN = ("general/piqa", "general/commonsense_qa")
OFF_ROWS, SCAN_ROWS, LEAST_SCAN, SPLIT_SEED = 250, 150, 100, 7
DEFAULTS: dict[str, Any] = {
    "ratio": 0.25,
    "drop_per_step": 2,
    "rows_per_epoch": 1500,
    "batch_rows": 32,
    "max_prompt_tokens": 256,
    "snapshots": [0.75, 0.5, 0.4],
}


def questions(data: Path, name: str, part: str) -> list[Question]:
    """The questions of a part; none where the set has no such part."""
    for end in (".jsonl", ".jsonl.gz"):
        file = data / name / f"{part}{end}"
        if file.is_file():
            return list(open_questions(file))
    return []


def divided(
    data: Path, name: str, limit: int
) -> tuple[list[Question], list[Question], list[Question]]:
    """Tune, scan and test rows of a set: the same for every seed and mode."""
    shuffled = random.Random(SPLIT_SEED)
    tune, scan = questions(data, name, "train"), questions(data, name, "validation")
    test = questions(data, name, "test")
    for rows in (tune, scan, test):
        shuffled.shuffle(rows)
    if not tune:
        tune, scan = scan[SCAN_ROWS:], scan[:SCAN_ROWS]
    missing = max(0, LEAST_SCAN - len(scan))
    tune, scan = tune[missing:], [*scan, *tune[:missing]]
    if not any(question.context for question in test):
        tune, scan = ([dataclasses.replace(q, context="") for q in rows] for rows in (tune, scan))
    return tune[:limit], scan[: min(SCAN_ROWS, limit)], test[:limit]


def run_one(job: dict[str, Any]) -> None:
    """One set, mode and seed; writes its JSON file."""
    import torch

    from shortstack.checkpoint import Checkpoint
    from shortstack.pretrained import load
    from shortstack.prune.trim.loop import trim
    from shortstack.prune.trim.model import TrimModel
    from shortstack.prune.trim.rows import Parts
    from shortstack.prune.trim.scan import Exam, evaluate
    from shortstack.prune.trim.settings import Settings, Target
    from shortstack.tokens import Encoder

    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    data, path = Path(job["data"]), Path(job["model"])
    fields = {**DEFAULTS, **job["settings"], "mode": job["mode"], "seed": job["seed"]}
    settings = Settings(**{**fields, "snapshots": shares(fields["snapshots"], job)})
    parts = Parts(*map(tuple, divided(data, job["set"], job["limit"])))
    if "epochs" not in job["settings"] and 2 * len(parts.tune) <= settings.rows_per_epoch:
        settings = dataclasses.replace(settings, epochs=2)  # a round of a small set is short
    off = {
        name: rows[: min(OFF_ROWS, job["limit"])]
        for name in OFF_DOMAIN
        if (rows := questions(data, name, "test"))
    }
    encoder = Encoder(Checkpoint.open(path))
    device = torch.device(job["device"])
    dense = {}
    if job["mode"] == "full":
        model = TrimModel(load(path, torch.float32).to(device), settings.unit)
        for name, asked in {"test": parts.test, **off}.items():
            exam = Exam(encoder, asked, settings.max_prompt_tokens, device)
            dense[name] = dataclasses.asdict(evaluate(model, exam))
        del model
    with tempfile.TemporaryDirectory(dir=job["work"]) as work:
        result = trim(
            load(path, torch.float32).to(device),
            encoder,
            parts,
            settings,
            Target(keep=shares([job["keep"]], job)[0]),
            Path(work),
            others=off,
            resumable=False,
            on_round=lambda row: print(job["mode"], job["set"], json.dumps(row), flush=True),
        )
    facts = {
        **described(job, settings, parts, result),
        "dense": dense,
        "wall_s": round(time.perf_counter() - start, 1),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "torch": torch.__version__,
    }
    Path(job["file"]).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def shares(of_whole: Sequence[float], job: dict[str, Any]) -> tuple[float, ...]:
    """Shares of the units that the job's model still has, from shares of those that it once had."""
    from shortstack.checkpoint import Checkpoint

    if job["units"] is None:
        return tuple(of_whole)
    left = Checkpoint.open(Path(job["model"])).n_layers
    left *= 1 if job["settings"].get("unit") == "block" else 2
    found = (share * job["units"] / left for share in of_whole)
    return tuple(share for share in found if share <= 1)


def described(job: dict[str, Any], settings: Settings, parts: Parts, result: Trimmed) -> Any:
    """What was asked for and what came of it, for the run's JSON file."""
    asked = ("name", "set", "mode", "seed", "keep", "device", "limit", "jobs", "units")
    return {
        **{name: job[name] for name in asked},
        "settings": dataclasses.asdict(settings),
        "rows": {name: len(getattr(parts, name)) for name in ("tune", "scan", "test")},
        "curve": result.curve,
        "kept": [
            {"left": k.n_left, "round": k.round, "gone": list(map(str, k.gone))}
            for k in result.kept
        ],
        "n_units": job["units"] or result.n_units,
        "trained": list(map(str, result.trained)),
        "tests": {
            str(left): {name: dataclasses.asdict(score) for name, score in scores.items()}
            for left, scores in result.tests.items()
        },
    }


def run_all(args: argparse.Namespace) -> int:
    """Start the runs that are missing, `jobs` at a time. Returns how many failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for seed in args.seeds:  # outermost: an early end still has every set
        for mode in args.modes:
            for name in args.sets:
                file = args.out / f"{args.name}.{name.replace('/', '_')}.{mode}.{seed}.json"
                if not file.is_file():
                    jobs.append(job_of(args, name, mode, seed, file))
    free: Queue[str] = Queue()
    for _ in range(args.jobs):
        for device in args.devices:
            free.put(device)

    def placed(job: dict[str, Any]) -> int:
        device = free.get()
        try:
            return started({**job, "device": device})
        finally:
            free.put(device)

    with ThreadPoolExecutor(args.jobs * len(args.devices)) as pool:
        return sum(pool.map(placed, jobs))


def job_of(args: argparse.Namespace, name: str, mode: str, seed: int, file: Path) -> dict[str, Any]:
    settings = dict(map(setting, args.set))
    keep = args.keep
    if mode == "full":
        settings["ratio"] = 1.0
    if mode == "one-shot":  # as many rounds as the progressive run had when it got there
        keep = args.one_shot_keep
    return {
        **{"name": args.name, "set": name, "mode": mode, "seed": seed, "file": str(file)},
        **{"model": str(args.model), "data": str(args.data), "units": args.units},
        **{"limit": args.limit or sys.maxsize, "keep": keep, "settings": settings},
        "jobs": args.jobs,
        "threads": args.threads or max(1, (os.cpu_count() or 1) // args.jobs // len(args.devices)),
        "work": str(args.work) if args.work else None,
    }


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def started(job: dict[str, Any]) -> int:
    """Run one job in a process of its own; its output goes beside its result."""
    log = Path(job["file"]).with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(job)], stdout=stream, stderr=stream
        ).returncode
    words = "done" if code == 0 else f"FAILED, see {log}"
    print(f"{job['set']} {job['mode']} seed {job['seed']}: {words}", flush=True)
    return int(code != 0)


def table(out: Path) -> str:
    """Markdown of all results in `out`: a row a set, run name, mode and depth; means over seeds."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for file in sorted(out.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["dense"]:
            groups.setdefault((run["set"], "", "untuned", 1.0), {})[run["seed"]] = run["dense"]
        for left, scores in run["tests"].items():
            share = round(int(left) / run["n_units"], 3)
            key = (run["set"], run["name"], run["mode"], share)
            groups.setdefault(key, {})[run["seed"]] = scores
    lines = [
        "| set | run | mode | left | accuracy, % (± half of 95 %) | against full (by seed) "
        "| macro-F1, % | off-domain, % | seeds | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = {"untuned": 0, "full": 1, "one-shot": 2, "progressive": 3}
    for key in sorted(groups, key=lambda k: (k[0], order[k[2]], k[1], -k[3])):
        full = groups.get((key[0], key[1], "full", 1.0)) or next(
            (groups[k] for k in sorted(groups) if k[0] == key[0] and k[2] == "full"), {}
        )
        lines.append(_line(key, groups[key], full))
    return "\n".join(lines)


def _line(
    key: tuple[Any, ...], runs: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]]
) -> str:
    name, run, mode, share = key
    accuracy = {seed: 100 * scores["test"]["accuracy"] for seed, scores in runs.items()}
    mean = statistics.fmean(accuracy.values())
    n = next(iter(runs.values()))["test"]["n"]
    # Of the rows, and of the seeds where there are several: both are drawn.
    variance = mean * (100 - mean) / n
    if len(runs) > 1:
        variance += statistics.variance(accuracy.values()) / len(runs)
    gaps = [accuracy[s] - 100 * full[s]["test"]["accuracy"] for s in sorted(runs) if s in full]
    against = (
        f"{statistics.fmean(gaps):+.1f} ({' '.join(f'{g:+.1f}' for g in gaps)})" if gaps else ""
    )
    f1 = [scores["test"]["macro_f1"] for scores in runs.values()]
    off = [s[other]["accuracy"] for s in runs.values() for other in s if other != "test"]
    cells = (
        *(name, run, mode, f"{share:.0%}"),
        f"{mean:.1f} ± {1.96 * math.sqrt(variance):.1f}",
        "" if mode == "full" else against,
        "" if f1[0] is None else f"{100 * statistics.fmean(f1):.1f}",
        f"{100 * statistics.fmean(off):.1f}" if off else "",
        *(len(runs), n),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def durations(out: Path) -> str:
    """Seconds a round and a run, least to most, to plan by: a line a name, mode, device, jobs."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for file in sorted(out.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        at_once = run.get("jobs", "?")  # files of older runs do not say
        groups.setdefault((run["name"], run["mode"], run["device"], at_once), []).append(run)
    lines = []
    for (name, mode, device, at_once), runs in sorted(groups.items(), key=str):
        rounds = [len(run["curve"]) for run in runs]
        each = [run["curve"][-1]["seconds"] / len(run["curve"]) for run in runs]
        beside = [run["wall_s"] - run["curve"][-1]["seconds"] for run in runs]
        lines.append(
            f"{name}, {mode}, {device}, {at_once} at once: {_between(each, 1)} s a round, "
            f"{_between(rounds)} rounds, {_between(beside)} s to load and test, "
            f"{_between([run['wall_s'] for run in runs])} s a run"
        )
    return "\n".join(lines)


def _between(values: Sequence[float], digits: int = 0) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=["full", "progressive", "one-shot"])
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--one-shot-keep", type=float, default=0.5)
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--jobs", type=int, default=1, help="on a device at a time")
    parser.add_argument("--units", type=int, help="sub-blocks before MODEL was cut")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--name", default="trim")
    parser.add_argument("--work", type=Path, help="for state while a run lasts, e.g. /dev/shm")
    parser.add_argument("--out", type=Path, default=Path("trim-results"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        run_one(json.loads(args.one))
        return 0
    failed = run_all(args) if args.model else 0
    print(table(args.out))
    print(durations(args.out))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
