"""Run a campaign: every trial in a fresh process, original and pruned in turn, one at a time."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shortstack import child
from shortstack.artifact import Artifact
from shortstack.devices.host import describe
from shortstack.devices.measurement import Failure, Measurement, MemoryTrial, Trial
from shortstack.devices.worker import PHASES
from shortstack.devices.workload import Prompt, Workload
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent

OPENER = "shortstack.runtimes:open_session"
ORDER = (
    "memory trials first (they leave the files in the page cache), then timed rounds; within a "
    "round original and pruned of one export follow each other, who goes first alternates"
)


@dataclass(frozen=True)
class Case:
    """One thing to measure: an artifact in a runtime. `label`: original, pruned."""

    label: str
    artifact: Artifact
    runtime: str

    @property
    def group(self) -> tuple[str, str]:
        """Cases of one group are compared, so they run next to each other."""
        return self.artifact.spec.slug, self.runtime


@dataclass(frozen=True)
class Step:
    """One trial to run: `case` counts in the order that the cases were given."""

    kind: Literal["memory", "timing"]
    round: int
    case: int


@dataclass
class _Log:
    """What has been seen of one case so far."""

    trials: list[Trial] = field(default_factory=list)
    memory: list[MemoryTrial] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


def schedule(cases: Sequence[Case], workload: Workload, seed: int) -> list[Step]:
    """The order of all trials: groups shuffled anew each round, members taking turns to lead."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(case.group, []).append(index)
    first = {key: rng.randrange(len(members)) for key, members in groups.items()}
    rounds: list[tuple[Literal["memory", "timing"], int]] = [
        *(("memory", r) for r in range(workload.memory_repeats)),
        *(("timing", r) for r in range(workload.repeats)),
    ]
    steps = []
    for kind, number in rounds:
        keys = list(groups)
        rng.shuffle(keys)
        for key in keys:
            members = groups[key]
            turn = (first[key] + number) % len(members)
            steps += [Step(kind, number, i) for i in members[turn:] + members[:turn]]
    return steps


def measure(
    cases: Sequence[Case],
    workload: Workload,
    prompt: Prompt,
    *,
    progress: OnProgress = silent,
    seed: int = 0,
    timeout_s: float = 900.0,
    opener: str = OPENER,
) -> list[Measurement]:
    """Measure all cases, interleaved; one Measurement a case, in their order.

    A case whose runtime dies, hangs or refuses is recorded as failed and the others go on.
    `opener` is `module:function` with the signature of `runtimes.open_session`.
    """
    _check(cases, workload, prompt)
    logs = [_Log() for _ in cases]
    steps = schedule(cases, workload, seed)
    begun = time.perf_counter()
    for position, step in enumerate(steps):
        progress(position, len(steps))
        case, log = cases[step.case], logs[step.case]
        if log.failure is None:
            request = {
                "path": str(case.artifact.path),
                "runtime": case.runtime,
                "workload": workload.to_dict(),
                "tokens": list(prompt.tokens),
                "opener": opener,
            }
            _run(step, position, time.perf_counter() - begun, case, request, timeout_s, log)
    progress(len(steps), len(steps))
    shared = {
        "workload": workload,
        "prompt_sha256": prompt.sha256,
        "prompt_source": prompt.source,
        "host": describe(),
        "protocol": _protocol(seed, timeout_s),
    }
    return [_close(case, log, shared) for case, log in zip(cases, logs, strict=True)]


def _run(
    step: Step,
    position: int,
    started_s: float,
    case: Case,
    request: Mapping[str, Any],
    timeout_s: float,
    log: _Log,
) -> None:
    """One trial in its process; puts what came of it into the log."""
    phase = PHASES[0]

    def entered(index: int, last: int) -> None:
        nonlocal phase
        phase = PHASES[min(index, last)]

    what = f"{case.runtime} with {case.label} {case.artifact.path.name}"
    try:
        answer = child.call(
            f"shortstack.devices.worker:{step.kind}",
            request,
            timeout_s=timeout_s,
            what=what,
            progress=entered,
        )
    except child.ChildCrashError as error:
        log.failure = Failure(error.kind, str(error), phase, error.signal_name, step.round)
        return
    except ShortstackError as error:
        log.failure = Failure("error", str(error), phase, None, step.round)
        return
    log.info = answer.pop("info")
    place: dict[str, Any] = {"round": step.round, "position": position}
    if step.kind == "memory":
        log.memory.append(MemoryTrial(**place, **answer))
    else:
        log.trials.append(Trial.from_dict({**place, "started_s": started_s, **answer}))


def _close(case: Case, log: _Log, shared: Mapping[str, Any]) -> Measurement:
    return Measurement(
        label=case.label,
        runtime=case.runtime,
        artifact=case.artifact,
        trials=tuple(log.trials),
        memory=tuple(log.memory),
        runtime_info=log.info,
        failure=log.failure,
        **shared,
    )


def _protocol(seed: int, timeout_s: float) -> dict[str, Any]:
    return {
        "order": ORDER,
        "seed": seed,
        "fresh_process_per_trial": True,
        "garbage_collector": "off while the clock runs",
        "decoding": "greedy argmax on the host, end of text ignored",
        "clock": "time.perf_counter",
        "timeout_s": timeout_s,
    }


def _check(cases: Sequence[Case], workload: Workload, prompt: Prompt) -> None:
    if len(prompt.tokens) != workload.prompt_tokens:
        raise ShortstackError(
            f"the prompt has {len(prompt.tokens)} tokens, the workload wants "
            f"{workload.prompt_tokens}. Give a longer text or a shorter prompt."
        )
    seen = set()
    for case in cases:
        key = (case.label, *case.group)
        if key in seen:
            raise ShortstackError(f"{' '.join(key)} is to be measured twice. Remove one.")
        seen.add(key)
