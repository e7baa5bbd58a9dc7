"""One trial, in a process of its own. `shortstack.child` calls these; nothing else does."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shortstack.child import report_progress
from shortstack.devices import energy as counters
from shortstack.devices import vram
from shortstack.devices.busy import CpuClock
from shortstack.devices.conditions import snapshot
from shortstack.devices.host import conditions
from shortstack.devices.lanes import Lanes, lanes
from shortstack.devices.memory import Sampler
from shortstack.devices.page_cache import prepare
from shortstack.devices.workload import Workload
from shortstack.session import Session

PHASES = ("start", "load", "warm-up", "run")
"""The phase a trial is in, told to the parent so that a crash can name it."""


NO_DECODE = "decode: this session cannot go back to the end of the prompt, so none is measured"

WINDOW = 4
WARMUP_S = 10.0
"""Beyond it a warm-up ends as it is: slow steps need not be many."""

PR_SET_PDEATHSIG = 1
STEADY = 0.05
"""Warm-up ends when the medians of the last two windows of decode steps differ by less."""


def timing(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load, warm up until steady, then time one prompt and every decode step behind it."""
    _end_with_parent()
    workload, tokens = Workload.from_dict(request["workload"]), request["tokens"]
    path, device = Path(request["path"]), request["device"]
    busy = CpuClock()
    before, device_before = conditions(), snapshot(device)
    pages = prepare(path, cold=request["cold"])
    _enter("load")
    start = time.perf_counter()
    session = _open(request, workload)
    load_s = time.perf_counter() - start
    with session:
        run = lanes(session, workload.batch)
        _enter("warm-up")
        warmup = _warm_up(run, tokens, workload)
        _enter("run")
        gc.collect()
        gc.disable()  # a collection in mid-step would be charged to the runtime
        busy.restart()
        times = _timed(run, tokens, workload)
        gc.enable()
        share = busy.foreign_share()
        info = session.info
    return {
        **times,
        "load_s": load_s,
        "load_kind": pages.pop("load_kind"),
        "warmup": warmup,
        "info": info,
        "device_before": device_before,
        "device_after": snapshot(device),
        "conditions": {
            "before": before,
            "after": conditions(),
            "foreign_cpu_share": share,
            "process_threads": _n_threads(),
            **pages,
        },
    }


def memory(request: Mapping[str, Any]) -> dict[str, Any]:
    """The same work without warm-up or clock, watched for memory."""
    _end_with_parent()
    workload, tokens = Workload.from_dict(request["workload"]), request["tokens"]
    # What the measuring code needs is in the baseline, not in the model's figure.
    importlib.import_module("numpy")
    importlib.import_module(request["opener"].partition(":")[0])
    gc.collect()
    card, _ = vram.watch(request["device"])
    sampler = Sampler()

    def ended(phase: str) -> None:
        sampler.phase(phase)
        if card is not None:
            card.phase(phase)

    _enter("load")
    session = _open(request, workload)
    ended("load")
    with session:
        _enter("run")
        run = lanes(session, workload.batch)
        chosen = run.choose(_at_depth(run, tokens, workload)())
        ended("prefill")
        for _ in range(workload.decode_tokens):
            chosen = run.choose(run.decode(chosen))
        ended("decode")
        info = session.info
    on_card = None if card is None else card.finish()
    return {**sampler.finish(), "device_memory": on_card, "info": info}


def energy(request: Mapping[str, Any]) -> dict[str, Any]:
    """Prefill, then decode, each again and again for a window of the device's energy counters."""
    _end_with_parent()
    workload, tokens = Workload.from_dict(request["workload"]), request["tokens"]
    _enter("load")
    with _open(request, workload) as session:
        run = lanes(session, workload.batch)
        _enter("warm-up")
        _warm_up(run, tokens, workload)
        _enter("run")
        works = _works(run, tokens, workload)
        found = counters.measured(request["device"], works)
        reasons = [found["energy_reason"], None if "decode" in works else NO_DECODE]
        reason = "; ".join(filter(None, reasons)) or None
        return {**found, "energy_reason": reason, "info": session.info}


def _works(
    run: Lanes, tokens: Sequence[int], workload: Workload
) -> dict[counters.Phase, Callable[[], int]]:
    """What is repeated in the windows; each returns the tokens it ran.

    Decoding begins again where the prompt ends; there is none where a session cannot go back
    there: behind a shorter context a token costs less than the record's other figures tell.
    """
    whole = run.prompt(tokens)

    def prefill() -> int:
        run.prefill(whole)
        return workload.input_tokens * workload.batch

    def again() -> Any:
        return run.again(whole, workload.input_tokens)

    def turn(logits: Any) -> int:
        for _ in range(workload.decode_tokens - 1):
            logits = run.decode(run.choose(logits))
        return workload.decode_tokens * workload.batch

    turn(run.prefill(whole))  # a cache with windows cannot go back once steps have moved them
    if again() is None:
        return {"prefill": prefill}
    return {"prefill": prefill, "decode": lambda: turn(again())}


def _open(request: Mapping[str, Any], workload: Workload) -> Session:
    module, _, name = request["opener"].partition(":")
    session: Session = getattr(importlib.import_module(module), name)(
        Path(request["path"]),
        request["runtime"],
        threads=workload.threads,
        context_tokens=workload.context_tokens,
        device=request["device"],
        batch=workload.batch,
        options=request["options"],
    )
    return session


def _warm_up(run: Lanes, tokens: Sequence[int], workload: Workload) -> dict[str, Any]:
    """Decode until the last windows agree, at most as often as the workload says, or WARMUP_S long.

    `steady` is None where there were fewer steps than two windows. `prefill_s` is of the first
    prompt after the load, which reads what a runtime that maps its file has not read yet.
    """
    clock = time.perf_counter
    prompt = run.prompt(tokens[: workload.warmup_prompt_tokens])
    start = clock()
    chosen = run.choose(run.prefill(prompt))
    prefill_s = clock() - start
    step_s: list[float] = []
    decoding = clock()
    while len(step_s) < workload.warmup_decode_tokens and not _steady(step_s):
        begun = clock()
        if begun - decoding > WARMUP_S:
            break
        chosen = run.choose(run.decode(chosen))
        step_s.append(clock() - begun)
    return {
        "prefill_s": prefill_s,
        "steps": len(step_s),
        "steady": _steady(step_s),
        "decode_step_s": step_s,
    }


def _steady(step_s: Sequence[float]) -> bool | None:
    if len(step_s) < 2 * WINDOW:
        return None
    now, before = median(step_s[-WINDOW:]), median(step_s[-2 * WINDOW : -WINDOW])
    return abs(now - before) <= STEADY * before


def _at_depth(run: Lanes, tokens: Sequence[int], workload: Workload) -> Callable[[], Any]:
    """Fill the cache to the workload's depth; what then runs the prompt and gives its logits."""
    prompt = run.prompt(tokens[workload.depth_tokens :])
    if not workload.depth_tokens:
        return lambda: run.prefill(prompt)
    run.prefill(run.prompt(tokens[: workload.depth_tokens]))
    return lambda: run.extend(prompt)


def _timed(run: Lanes, tokens: Sequence[int], workload: Workload) -> dict[str, Any]:
    """Greedy, end of text ignored: always as many decode steps, after the first token."""
    clock = time.perf_counter
    start_prompt = _at_depth(run, tokens, workload)
    out, step_s = [], []
    start = clock()
    logits = start_prompt()
    prefilled = clock()
    chosen = run.choose(logits)
    first = clock()
    out.append(chosen)
    for _ in range(workload.decode_tokens):
        begun = clock()
        chosen = run.choose(run.decode(chosen))
        step_s.append(clock() - begun)
        out.append(chosen)
    ids = [one if isinstance(one, int) else one.ravel().tolist() for one in out]
    return {
        "prefill_s": prefilled - start,
        "ttft_s": first - start,
        "decode_step_s": step_s,
        "output_sha256": hashlib.sha256(repr(ids).encode()).hexdigest(),
    }


def _end_with_parent() -> None:
    """Where a campaign is killed, its trial must not disturb the one that goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _n_threads() -> int:
    import psutil

    return int(psutil.Process().num_threads())


def _enter(phase: str) -> None:
    report_progress(PHASES.index(phase), len(PHASES) - 1)
