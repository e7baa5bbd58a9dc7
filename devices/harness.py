"""Run a campaign: every trial in a fresh process, original and pruned in turn, one at a time."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack import child
from shortstack.artifact import Artifact
from shortstack.devices import pace, worker
from shortstack.devices.energy import counters
from shortstack.devices.fit import kv_bytes_per_token, refusal
from shortstack.devices.host import describe
from shortstack.devices.journal import Journal
from shortstack.devices.measurement import Failure, Measurement, MemoryTrial, Trial
from shortstack.devices.nvidia import ORDER
from shortstack.devices.protocol import Protocol
from shortstack.devices.schedule import Case, Step, schedule
from shortstack.devices.workload import Prompt, Workload
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent

FOLDERS = re.compile(r"(?<![\w/.])(?<!:(?=//[^/]))(?:[A-Za-z]:)?(?:[/\\]+[^\s/\\:'\"|,]+)+[/\\]")
"""The folders of an absolute path, also behind a colon; not the host of a URL."""
NO_ENERGY = "not asked for"


@dataclass
class _Log:
    """What has been seen of one case so far."""

    trials: list[Trial] = field(default_factory=list)
    memory: list[MemoryTrial] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    energy: tuple[Mapping[str, Any], ...] = ()
    energy_reason: str | None = NO_ENERGY

    def take(self, step: Step, position: int, outcome: Mapping[str, Any]) -> None:
        if "failure" in outcome:
            self.failure = Failure(**outcome["failure"])
            return
        answer = dict(outcome["answer"])
        self.info = answer.pop("info")
        if step.kind == "energy":
            self.energy, self.energy_reason = tuple(answer["energy"]), answer["energy_reason"]
            return
        place = {"round": step.round, "position": position}
        if step.kind == "memory":
            self.memory.append(MemoryTrial(**{**place, **answer}))
        else:
            started = {"started_s": outcome["started_s"]}
            self.trials.append(Trial.from_dict({**place, **started, **answer}))


def measure(
    cases: Sequence[Case],
    workload: Workload,
    prompt: Prompt,
    *,
    progress: OnProgress = silent,
    tell: Callable[[str], None] = lambda line: None,
    protocol: Protocol | None = None,
    journal: Journal | None = None,
) -> list[Measurement]:
    """Measure all cases, interleaved; one Measurement a case, in their order.

    A case whose runtime dies, hangs or refuses is recorded as failed and the others go on.
    `workload` and `prompt` are those of every case that has none of its own; rounds, cool-down and
    time budget are the campaign's alone. `tell` gets one line a trial. What `journal` holds is not
    run again.
    """
    campaign = _Campaign(cases, workload, prompt, protocol or Protocol(), journal or Journal())
    campaign.run(progress, tell)
    return campaign.measurements()


class _Campaign:
    """The state of one call of `measure`."""

    def __init__(
        self,
        cases: Sequence[Case],
        workload: Workload,
        prompt: Prompt,
        protocol: Protocol,
        journal: Journal,
    ) -> None:
        self._cases = cases
        self._workload = workload
        self._protocol = protocol
        self._journal = journal
        self._work = [(case.workload or workload, case.prompt or prompt) for case in cases]
        _check(cases, self._work)
        self._logs = [_Log() for _ in cases]
        able = self._with_counters()
        self._steps = schedule(cases, workload, protocol.seed, able, cold=protocol.cold)
        self._pace = pace.Pace()

    def _with_counters(self) -> list[int]:
        """The cases whose energy can be measured; the others are told why not."""
        able: list[int] = []
        for index, (case, log) in enumerate(zip(self._cases, self._logs, strict=True)):
            if self._protocol.energy:
                found, reasons = counters(case.device)
                log.energy_reason = "; ".join(reasons) or "the campaign ended before"
                able += [index] if found else []
        return able

    def run(self, progress: OnProgress, tell: Callable[[str], None]) -> None:
        n_steps = len(self._steps)
        for position, step in self._in_time():
            progress(position, n_steps)
            log = self._logs[step.case]
            if log.failure is not None:
                continue
            outcome = self._journal.get(step.key)
            if outcome is None:
                begun = time.perf_counter()
                outcome = self._trial(step)
                self._journal.add(step.key, outcome)
                self._pace.add(step.kind, step.case, time.perf_counter() - begun)
                log.take(step, position, outcome)
                tell(self._line(position, step))
            else:
                log.take(step, position, outcome)
        progress(n_steps, n_steps)

    def _in_time(self) -> Iterator[tuple[int, Step]]:
        """Every step, but of no round that would start behind the budget; the first timed round
        runs whatever it takes."""
        budget = self._workload.time_budget_s
        current, late = ("", -1), False
        for position, step in enumerate(self._steps):
            if (step.kind, step.round) != current:
                current = step.kind, step.round
                spent = budget is not None and self._journal.clock_s > budget
                late = spent and current != ("timing", 0)
            if not late or self._journal.get(step.key) is not None:
                yield position, step

    def _trial(self, step: Step) -> dict[str, Any]:
        """Run one trial; `answer` and `started_s`, or `failure`."""
        case, log = self._cases[step.case], self._logs[step.case]
        work, prompt = self._work[step.case]
        if not log.trials and not log.memory:
            why = refusal(case.artifact, work, case.device, case.device_info, dict(case.options))
            if why is not None:
                return {"failure": vars(Failure("error", why, worker.PHASES[0], None, step.round))}
        if self._workload.cooldown_s:
            time.sleep(self._workload.cooldown_s)
        request = {
            "path": str(case.artifact.path),
            "runtime": case.runtime,
            "workload": work.to_dict(),
            "tokens": list(prompt.tokens),
            "opener": self._protocol.opener,
            "device": case.device,
            "options": dict(case.options),
            "cold": self._protocol.cold and step.round % 2 == 1,
        }
        started_s = self._journal.clock_s
        outcome = _call(step, case, request, self._protocol.timeout_s)
        if "answer" in outcome and step.kind == "timing":
            outcome["answer"]["conditions"]["sitting"] = self._journal.sitting
        return {**outcome, "started_s": started_s}

    def _line(self, position: int, step: Step) -> str:
        """One trial in one line, with the time left."""
        case, log = self._cases[step.case], self._logs[step.case]
        work, _ = self._work[step.case]
        todo = [
            (s.kind, s.case)
            for s in self._steps[position + 1 :]
            if self._logs[s.case].failure is None and self._journal.get(s.key) is None
        ]
        left_s = self._pace.left_s(todo)
        budget = self._workload.time_budget_s
        if budget is not None and left_s is not None:
            left_s = min(left_s, max(0.0, budget - self._journal.clock_s))
        return (
            f"{position + 1}/{len(self._steps)} {case.label} {case.artifact.spec.slug} in "
            f"{case.runtime}, {work.prompt_tokens} tokens: {_figures(log, step, work)}; "
            f"{pace.in_words(left_s)}"
        )

    def measurements(self) -> list[Measurement]:
        host = describe()
        made = []
        for case, log, (work, prompt) in zip(self._cases, self._logs, self._work, strict=True):
            path, cache = case.artifact.path, log.info.get("kv_cache")
            made.append(
                Measurement(
                    label=case.label,
                    runtime=case.runtime,
                    artifact=as_loaded(case.artifact, log.info),
                    trials=tuple(log.trials),
                    memory=tuple(log.memory),
                    runtime_info=log.info,
                    failure=log.failure,
                    workload=work,
                    prompt_sha256=prompt.sha256,
                    prompt_source=prompt.source,
                    host=host,
                    protocol=self._protocol.to_dict(),
                    device=case.device,
                    device_info=case.device_info,
                    options=dict(case.options),
                    kv_bytes_per_token=kv_bytes_per_token(path, case.artifact.format, cache),
                    energy=log.energy,
                    energy_reason=log.energy_reason,
                )
            )
        return made


def as_loaded(artifact: Artifact, info: Mapping[str, Any]) -> Artifact:
    """The artifact with the bytes that a session found after quantizing; what was planned is an
    estimate."""
    if "weight_bytes" not in info:
        return artifact
    return dataclasses.replace(
        artifact,
        size_bytes=info["weight_bytes"],
        weight_bytes_per_token=info["weight_bytes_per_token"],
    )


def _call(step: Step, case: Case, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """One trial in its process; what it answered, or how it failed."""
    phase = worker.PHASES[0]

    def entered(index: int, last: int) -> None:
        nonlocal phase
        phase = worker.PHASES[min(index, last)]

    what = f"{case.runtime} with {case.label} {case.artifact.path.name}"

    def failed(kind: str, error: Exception, signal_name: str | None = None) -> dict[str, Any]:
        words = without_folders(str(error), case.artifact.path)
        return {"failure": vars(Failure(kind, words, phase, signal_name, step.round))}

    try:
        answer = child.call(
            f"shortstack.devices.worker:{step.kind}",
            request,
            timeout_s=timeout_s,
            what=what,
            progress=entered,
            env=ORDER,
        )
    except child.ChildCrashError as error:
        return failed(error.kind, error, error.signal_name)
    except ShortstackError as error:
        return failed("error", error)
    return {"answer": answer}


def without_folders(text: str, path: Path) -> str:
    """Paths cut down to names: a record tells nobody how a disk is arranged."""
    return FOLDERS.sub("", text.replace(f"{path.parent}{os.sep}", ""))


def _figures(log: _Log, step: Step, work: Workload) -> str:
    if log.failure is not None:
        return f"FAILED: {log.failure.message}"
    if step.kind == "memory":
        return f"peak {log.memory[-1].peak_total_bytes / 1e6:,.0f} MB"
    if step.kind == "energy":
        joules = [f"{e['phase']} {e['gross_j'] / e['tokens']:.3g} J/token" for e in log.energy]
        return ", ".join(joules) or str(log.energy_reason)
    trial = log.trials[-1]
    rate = work.batch * trial.decode_tokens_per_s
    return f"TTFT {trial.ttft_s:.3g} s, decode {rate:.3g} tokens/s"


def _check(cases: Sequence[Case], work: Sequence[tuple[Workload, Prompt]]) -> None:
    for workload, prompt in work:
        if len(prompt.tokens) != workload.input_tokens:
            raise ShortstackError(
                f"the prompt has {len(prompt.tokens)} tokens, the workload wants "
                f"{workload.input_tokens}. Give a longer text or a shorter prompt."
            )
    seen = set()
    for case in cases:
        key = (case.label, *case.group)
        if key in seen:
            raise ShortstackError(f"{' '.join(key)} is to be measured twice. Remove one.")
        seen.add(key)
