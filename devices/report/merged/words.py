"""The merged report's sentences: what it is, what to know first, what failed, what words mean."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shortstack.devices.report.charts import number
from shortstack.devices.report.details import Facts
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.llama_bench import left_out
from shortstack.devices.report.merged.matrix import Row
from shortstack.devices.report.merged.merge import Merged
from shortstack.devices.report.view import NONE, Table
from shortstack.devices.stats import median

DEFINITIONS: Facts = [
    (
        "Prefill",
        "prompt tokens of all sequences over the time from prompt in to logits of the last token.",
    ),
    (
        "First token",
        "prompt in, already tokenized, to the id of the first token chosen (TTFT).",
    ),
    (
        "Decode",
        "steps of a trial over the time of the steps, times the batch; a step is one token in, the "
        "next token chosen. Timed, never derived from the whole minus the prefill. A decode step, "
        "ms, is its inverse for one sequence (TPOT).",
    ),
    ("Depth", "tokens put into the cache, untimed, before the timed prompt."),
    (
        "Interval",
        "95 % percentile bootstrap of the median over trials; with five trials it is their range, "
        "with fewer it covers less.",
    ),
    (
        "Not comparable",
        "another artifact (its hash), workload, prompt (its hash), protocol, option, type of KV "
        "cache, runtime or major version of the runtime than most of the row has; the first two "
        "numbers of a version count where it begins with 0. The figure itself is in the table of "
        "speeds.",
    ),
    (
        "Machine",
        "told from its parts alone: records hold no host name. Two records of equal parts count as "
        "one machine; letters tell apart machines that are named alike.",
    ),
    (
        "What fewer layers bring",
        "the shallower against the deepest model of the same export, runtime, device and work. In "
        "turn: the median over rounds of the ratio of neighbours in one run. Apart: the ratio of "
        "medians. Which artifacts are one model is told from parameters and layers.",
    ),
    (
        "Front",
        "an artifact is beaten by one that is no worse in every figure judged and better in one; "
        "medians, without regard to intervals.",
    ),
    (
        "Peak resident",
        "memory of the process, measuring code included. Anonymous pages must stay in RAM; "
        "file-backed ones (mapped weights) can be dropped. Device over idle: peak of the whole "
        "device less what was in use before.",
    ),
    (
        "Projected",
        "computed, not measured, for a device that was not at hand; always with its error, or "
        "that the error is not known.",
    ),
]


def headline(merged: Merged) -> str:
    machines, places = len(merged.machines), len({c.place for c in merged.cases})
    files = len({c.sha256 for c in merged.cases})
    return (
        f"{_count(files, 'artifact')} on {_count(places, 'device')} of "
        f"{_count(machines, 'machine')}: {_count(len(merged.cases), 'measurement')} "
        f"from {_count(len(merged.records), 'run')}"
    )


def lead(merged: Merged, rows: Sequence[Row]) -> str:
    """The fastest at each place, then how much of it may be compared."""
    told = []
    for place in dict.fromkeys(case.place for case in merged.measured):
        cases = [case for case in merged.measured if case.place == place]
        best = max(cases, key=lambda case: median(case.decode_tokens_per_s))
        speed = number(median(best.decode_tokens_per_s))
        told.append(f"{place.name} at most {speed} tokens/s ({best.title}, {best.shape.words})")
    if not told:
        return "Nothing was timed."
    refused = sum(bool(row.reasons(case)) for row in rows for case in row.cases)
    mark = f" {_count(refused, 'cell')} marked as not comparable." if refused else ""
    return f"Decode: {'; '.join(told)}.{mark}"


def runs(merged: Merged) -> Table:
    rows = tuple(
        (
            str(number_),
            record.run_id[:12],
            {"run": "shortstack run", "bench": "shortstack bench"}.get(record.kind, record.kind),
            record.started_at or NONE,
            record.tool_version,
            _command(record.command),
            str(len(record.measurements)),
            _count(len(record.told_again), "copy") if record.told_again else NONE,
        )
        for number_, record in enumerate(merged.records, 1)
    )
    columns = ("Run", "Id", "Made by", "Begun", "Version", "Command", "Measurements", "Also given")
    return Table("The runs", columns, rows, 6)


def quality_words(merged: Merged) -> str:
    quality = merged.quality
    if quality is None:
        return (
            "No record and no evaluation tells the quality of these artifacts, so they are judged "
            "by speed and memory alone. shortstack report takes evaluations with --eval."
        )
    known = len({c.sha256 for c in merged.cases if quality.of(c)})
    told = {
        "evaluation": f"{quality.metric} on {quality.text}, from shortstack eval",
        "verification": f"{quality.metric} of each file in its own runtime on the text "
        f"{quality.text}, from its verification",
    }[quality.source]
    return f"Quality: {told}; known of {known} of {_count(_artifacts(merged), 'artifact')}."


def energy_words(merged: Merged) -> Facts:
    """Why energy is missing, in whole or in part, each reason once."""
    reasons: dict[str, list[str]] = {}
    for case in merged.cases:
        why = case.measurement.energy_reason
        if not case.measurement.energy:
            why = why or "not measured by this run"
        if why:
            reasons.setdefault(why, []).append(case.place.name)
    return [(", ".join(dict.fromkeys(where)), why) for why, where in reasons.items()]


def warnings(cases: Sequence[Case]) -> Facts:
    """What every case is flagged with is said once, the rest in one line a case."""
    flagged = [set(case.measurement.flags) for case in cases]
    common = set.intersection(*flagged) if len(cases) > 1 else set()
    told = [(f"All {len(cases)} measurements", flag) for flag in sorted(common)]
    for case in cases:
        own = [flag for flag in case.measurement.flags if flag not in common]
        if not case.measurement.trials and case.measurement.failure is None:
            own.append("not timed: the record holds no trial and no failure. Measure it again")
        told += [(_where(case), "; ".join(own))] if own else []
    return told


def notes(merged: Merged) -> Facts:
    """What the exporter wants known, once an artifact."""
    artifacts = {case.sha256: case for case in reversed(merged.cases)}
    return [
        (case.title, note)
        for case in reversed(artifacts.values())
        for note in case.measurement.artifact.notes
    ]


def failures(merged: Merged) -> Facts:
    found = [
        (_where(case), f"during {failure.phase}: {failure.message}")
        for case in merged.cases
        if (failure := case.measurement.failure)
    ]
    return found + [item for record in merged.records for item in record.unmade]


def llama_bench_words(merged: Merged) -> str:
    missing = left_out(merged.cases)
    words = (
        "The same figures in the shape of llama-bench: means and deviations over trials, decode at "
        "the depth of the prompt. llama-bench.json holds the samples."
    )
    if missing:
        words += f" {_count(len(missing), 'measurement')} of a batch above 1 have no place there."
    return words


def _command(command: str | None) -> str:
    """Names only: where a model lies is nobody's business."""
    return NONE if command is None else re.sub(r"\S*[/\\](?=\S)", "", command)


def _where(case: Case) -> str:
    return f"{case.title}, {case.runtime}, {case.place.name}, run {case.run}"


def _artifacts(merged: Merged) -> int:
    return len({case.sha256 for case in merged.cases})


def _count(count: int, what: str) -> str:
    if count != 1:
        what = what[:-1] + "ies" if what.endswith("y") else what + "s"
    return f"{count} {what}"
