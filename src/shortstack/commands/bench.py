"""`shortstack bench`: one campaign, one folder; its trials are kept as they come in."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack import __version__
from shortstack.bench.plan import BenchChoice, Plan, make_plan
from shortstack.devices import fit
from shortstack.devices.energy import counters
from shortstack.devices.harness import measure
from shortstack.devices.host import describe
from shortstack.devices.journal import Journal
from shortstack.devices.measurement import SCHEMA, Measurement
from shortstack.devices.protocol import Protocol
from shortstack.devices.schedule import Step, schedule
from shortstack.devices.stats import median
from shortstack.devices.workload import Workload
from shortstack.errors import ShortstackError
from shortstack.folder_lock import alone_in
from shortstack.intake import model_paths
from shortstack.manifest import (
    MANIFEST,
    check_apart,
    check_ours,
    finished,
    partial_of,
    read_manifest,
    step_key,
    write_manifest,
    write_text,
)
from shortstack.progress import Display

RECORD, TRIALS = "bench.json", "trials.jsonl"
STEP = "bench"
UNFINISHED = {TRIALS: {"size": None}, RECORD: {"size": None}}
"""What the manifest of a campaign in progress lists: our files, not yet as they will be."""


def bench(
    models: Sequence[str], choice: BenchChoice, out: Path, display: Display, *, dry_run: bool
) -> dict[str, Any]:
    """Measure models in every runtime that opens them; the record is `out`/bench.json.

    A campaign that was killed goes on with what it has when it is started again; `out` of another
    campaign is refused. What failed in a finished campaign is tried again. With `dry_run` nothing
    is written and no model is loaded.
    """
    check_ours(out, STEP)  # before any model is looked at
    check_apart(out, [path for name in models for path in model_paths(name)])
    plan = make_plan(models, choice)
    for line in plan.skipped:
        display.note(line)
    if dry_run:
        return _forecast(plan)
    with _claimed(out, step_key(STEP, plan.identity)) as campaign:
        if campaign.done:
            display.note("measured before with the same settings, kept")
        else:
            _measure(plan, campaign, models, display)
    return _answer(out)


@dataclass(frozen=True)
class _Claim:
    """A folder that holds this campaign and no other."""

    folder: Path
    key: str
    run_id: str
    started_at: str
    done: bool
    retry: bool = False
    """Done before, but for what failed."""


def _measure(plan: Plan, claim: _Claim, models: Sequence[str], display: Display) -> None:
    choice, first = plan.choice, plan.cases[0]
    assert first.workload is not None
    assert first.prompt is not None
    protocol = Protocol(choice.seed, choice.timeout_s, choice.cold, choice.energy)
    found = _ceilings(choice, first.workload.threads, display)
    with display.step("Measure, in turn") as progress:
        measured = measure(
            plan.cases,
            first.workload,
            first.prompt,
            progress=progress,
            tell=display.note,
            protocol=protocol,
            journal=Journal(claim.folder / TRIALS, retry=claim.retry),
        )
    record = {
        "schema": SCHEMA,
        "kind": "bench",
        "tool_version": __version__,
        "run_id": claim.run_id,
        "started_at": claim.started_at,
        "finished_at": _now(),
        "command": command_of(models, choice),
        "seed": choice.seed,
        "host": describe(),
        "ceilings": found,
        "protocol": protocol.to_dict(),
        "measurements": [m.to_dict() for m in measured],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(claim.folder / RECORD, text + "\n")
    failures = [m.failure.message for m in measured if m.failure]
    facts = {"run_id": claim.run_id, "started_at": claim.started_at, "failures": failures}
    write_manifest(claim.folder, STEP, claim.key, facts)


def _ceilings(choice: BenchChoice, threads: int, display: Display) -> dict[str, Any]:
    """What the device can do at most, by its id; empty, with a word, where that cannot be had."""
    if not choice.ceilings:
        return {}
    from shortstack.devices.roofline import ceilings

    with display.step(f"Measure what {choice.device} can do at most"):
        try:
            return {choice.device: ceilings.measure(choice.device, threads=threads)}
        except ShortstackError as error:
            display.note(f"no ceilings: {error}")
            return {}


@contextlib.contextmanager
def _claimed(out: Path, key: str) -> Iterator[_Claim]:
    """Take `out` for the campaign `key`; one that ends before its first trial leaves nothing."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        for name in (MANIFEST, RECORD):
            partial_of(out / name).unlink(missing_ok=True)  # a hard kill left it
        manifest = read_manifest(out)
        fresh = manifest is None
        if manifest is not None and (manifest.get("key") != key or "run_id" not in manifest):
            raise ShortstackError(
                f"{out} holds another campaign: other models, settings, machine or versions. "
                "Choose another -o, or remove the folder."
            )
        done = finished(out, key) is not None
        again = done and bool(manifest and manifest["failures"])
        started_at = manifest["started_at"] if manifest else _now()
        if manifest is None or again:
            manifest = _begin(out, key, started_at, retry=again)
        retry = bool(manifest.get("retry"))  # also of one that was killed while it tried again
        claim = _Claim(out, key, manifest["run_id"], started_at, done and not retry, retry)
        try:
            yield claim
        except BaseException:
            if fresh and not _has_trials(out / TRIALS):
                for name in (MANIFEST, TRIALS):
                    (out / name).unlink(missing_ok=True)
                if made:
                    shutil.rmtree(out)
            raise


def _begin(out: Path, key: str, started_at: str, *, retry: bool) -> dict[str, Any]:
    """Write the manifest of a campaign in progress. Each record has an id of its own."""
    manifest = {
        "tool": "shortstack",
        "version": __version__,
        "step": STEP,
        "key": key,
        "run_id": uuid.uuid4().hex,
        "started_at": started_at,
        "retry": retry,
        "files": UNFINISHED,
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _has_trials(file: Path) -> bool:
    return file.is_file() and '"trial"' in file.read_text(encoding="utf-8")


def _answer(out: Path) -> dict[str, Any]:
    """What the command prints: the medians of the record that lies in `out` now."""
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    measured = [Measurement.from_dict(data) for data in record["measurements"]]
    return {
        "folder": str(out),
        "record": str(out / RECORD),
        "run_id": record["run_id"],
        "measurements": [figures(m) for m in measured],
        "failures": [m.failure.message for m in measured if m.failure],
    }


def figures(record: Measurement) -> dict[str, Any]:
    """The medians of one measurement; None where there is no trial."""
    loads = {
        f"load_{kind}_s": _median([t.load_s for t in record.trials if t.load_kind == kind])
        for kind in ("warm", "cold")
    }
    return {
        "label": record.label,
        "export": record.artifact.spec.slug,
        "runtime": record.runtime,
        "device": record.device,
        "prompt_tokens": record.workload.prompt_tokens,
        "depth_tokens": record.workload.depth_tokens,
        "batch": record.workload.batch,
        **loads,
        "ttft_s": _median(record.ttft_s),
        "prefill_tokens_per_s": _median(record.prefill_tokens_per_s),
        "decode_tokens_per_s": _median(record.decode_tokens_per_s),
        "peak_rss_bytes": _median([m.peak_total_bytes for m in record.memory]),
        "kv_bytes_per_token": record.kv_bytes_per_token,
        "failed": record.failure is not None,
        "flags": list(record.flags),
    }


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _forecast(plan: Plan) -> dict[str, Any]:
    """What the campaign would do, from headers alone."""
    workload = plan.cases[0].workload
    assert workload is not None
    refused = plan.refusals()
    return {
        "device": plan.choice.device,
        "trials": len(_steps(plan, workload)),
        "available_bytes": fit.available_bytes(plan.choice.device, plan.cases[0].device_info),
        "cases": [
            {
                "label": case.label,
                "export": case.artifact.spec.slug,
                "runtime": case.runtime,
                "prompt_tokens": case.workload.prompt_tokens,
                "context_tokens": case.workload.context_tokens,
                "weight_bytes": fit.weight_bytes(case.artifact.to_dict()),
            }
            for case in plan.cases
            if case.workload is not None
        ],
        "skipped": list(plan.skipped),
        "does_not_fit": refused,
    }


def _steps(plan: Plan, workload: Workload) -> list[Step]:
    choice = plan.choice
    cases = enumerate(plan.cases) if choice.energy else ()
    able = [index for index, case in cases if counters(case.device)[0]]
    return schedule(plan.cases, workload, choice.seed, able, cold=choice.cold)


def command_of(models: Sequence[str], choice: BenchChoice) -> str:
    """The command that measures the same, with names in place of paths."""
    words = ["shortstack bench", *(Path(name).name for name in models), "-o OUT"]
    words += [f"--runtime {name}" for name in choice.runtimes]
    words += [f"--prompt-tokens {count}" for count in choice.prompt_tokens]
    for name in ("decode_tokens", "repeats", "memory_repeats", "seed"):
        words.append(f"--{name.replace('_', '-')} {getattr(choice, name)}")
    default = BenchChoice()
    given = {"depth_tokens": "depth", "batch": "batch", "threads": "threads", "device": "device"}
    given |= {"cooldown_s": "cooldown", "time_budget_s": "time-budget", "timeout_s": "timeout"}
    for name, option in given.items():
        if getattr(choice, name) != getattr(default, name):
            words.append(f"--{option} {getattr(choice, name)}")
    words += [f"--option {name}={value}" for name, value in sorted(choice.options.items())]
    words += [] if choice.ceilings else ["--no-ceilings"]
    words += [f"--{name}" for name in ("cold", "energy") if getattr(choice, name)]
    return " ".join([*words, f"--text {Path(choice.text).name}"])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
