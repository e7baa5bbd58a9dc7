"""One trial, in a process of its own. `shortstack.child` calls these; nothing else does."""

from __future__ import annotations

import gc
import hashlib
import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack.child import report_progress
from shortstack.devices.host import conditions
from shortstack.devices.memory import Sampler
from shortstack.devices.workload import Workload
from shortstack.session import Session

PHASES = ("start", "load", "warm-up", "run")
"""The phase a trial is in, told to the parent so that a crash can name it."""


def timing(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load, warm up, then time one prefill and every decode step."""
    workload, tokens = Workload.from_dict(request["workload"]), request["tokens"]
    busy = _CpuClock()
    before = conditions()
    _enter("load")
    start = time.perf_counter()
    session = _open(request, workload)
    load_s = time.perf_counter() - start
    with session:
        _enter("warm-up")
        _generate(session, tokens[: workload.warmup_prompt_tokens], workload.warmup_decode_tokens)
        _enter("run")
        gc.collect()
        gc.disable()  # a collection in mid-step would be charged to the runtime
        busy.restart()
        times = _generate(session, tokens, workload.decode_tokens)
        gc.enable()
        share = busy.foreign_share()
        info = session.info
    return {
        **times,
        "load_s": load_s,
        "info": info,
        "conditions": {
            "before": before,
            "after": conditions(),
            "foreign_cpu_share": share,
            "process_threads": _n_threads(),
        },
    }


def memory(request: Mapping[str, Any]) -> dict[str, Any]:
    """The same work without warm-up or clock, watched for memory."""
    workload, tokens = Workload.from_dict(request["workload"]), request["tokens"]
    # What the measuring code needs is in the baseline, not in the model's figure.
    importlib.import_module("numpy")
    importlib.import_module(request["opener"].partition(":")[0])
    gc.collect()
    sampler = Sampler()
    _enter("load")
    session = _open(request, workload)
    sampler.phase("load")
    with session:
        _enter("run")
        token = int(session.prefill(tokens).argmax())
        sampler.phase("prefill")
        for _ in range(workload.decode_tokens):
            token = int(session.decode(token).argmax())
        sampler.phase("decode")
        info = session.info
    return {**sampler.finish(), "info": info}


def _open(request: Mapping[str, Any], workload: Workload) -> Session:
    module, _, name = request["opener"].partition(":")
    session: Session = getattr(importlib.import_module(module), name)(
        Path(request["path"]),
        request["runtime"],
        threads=workload.threads,
        context_tokens=workload.context_tokens,
    )
    return session


def _generate(session: Session, tokens: Sequence[int], steps: int) -> dict[str, Any]:
    """Greedy, end of text ignored: always `steps` decode steps after the first token."""
    clock = time.perf_counter
    out, step_s = [], []
    start = clock()
    logits = session.prefill(tokens)
    prefilled = clock()
    token = int(logits.argmax())
    first = clock()
    out.append(token)
    for _ in range(steps):
        begun = clock()
        token = int(session.decode(token).argmax())
        step_s.append(clock() - begun)
        out.append(token)
    return {
        "prefill_s": prefilled - start,
        "ttft_s": first - start,
        "decode_step_s": step_s,
        "output_sha256": hashlib.sha256(repr(out).encode()).hexdigest(),
    }


class _CpuClock:
    """How much of the machine's CPU time went to others while we ran."""

    LEAST_S = 0.5
    """Systems count CPU time in steps of 10 ms: a shorter window says nothing."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self.restart()

    def restart(self) -> None:
        self._wall = time.perf_counter()
        self._all, self._own = self._read()

    def foreign_share(self) -> float | None:
        """Busy time of all cores that was not ours, over the time of all cores."""
        busy, own = self._read()
        wall = time.perf_counter() - self._wall
        if wall < self.LEAST_S:
            return None
        foreign = (busy - self._all) - (own - self._own)
        share = foreign / (wall * (self._psutil.cpu_count() or 1))
        return round(min(1.0, max(0.0, share)), 4)

    def _read(self) -> tuple[float, float]:
        times = self._psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts guests twice: inside user, and apart.
        twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        own = self._process.cpu_times()
        return sum(times) - idle - twice, own.user + own.system


def _n_threads() -> int:
    import psutil

    return int(psutil.Process().num_threads())


def _enter(phase: str) -> None:
    report_progress(PHASES.index(phase), len(PHASES) - 1)
