"""The sections below the charts: how it was measured, where it came from, what failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from shortstack.devices.report.charts import number
from shortstack.devices.report.data import Entry, ModelFacts, ReportData
from shortstack.devices.report.headline import cut_words
from shortstack.devices.report.view import NONE, megabytes, spec_name

Facts = list[tuple[str, str]]

DEFINITIONS: Facts = [
    (
        "Decode speed",
        "timed decode steps of a trial over the time they took together (1 / TPOT), batch 1; a "
        "step is one token in, the next token chosen. The first token is not among them.",
    ),
    ("Prefill speed", "prompt tokens over the time from prompt in to logits of the last token."),
    ("First token", "prefill and the choice of the first token; the prompt is already tokenized."),
    (
        "Load",
        "from a fresh process to a session that takes a prompt, the runtime's library included. "
        "The file was read before, so it comes from the page cache.",
    ),
    (
        "Peak memory",
        "resident memory in trials of their own, which are not timed, measuring code included. "
        "Total: the kernel's own peak. Anonymous and file-backed: sampled, each at its own peak.",
    ),
    (
        "Speed-up",
        "the median over rounds of the ratio between neighbours, original and what it is "
        "compared with, so that slow "
        "drift of the machine cancels out; 95 % interval by bootstrap over rounds.",
    ),
    (
        "Read a token",
        "weight bytes that decoding one token reads: every layer and the head once.",
    ),
    (
        "Speed-up over bytes saved",
        "speed-up over the ratio of bytes read a token; above 100 % where arithmetic, not reading, "
        "is the limit.",
    ),
    (
        "Mean KL",
        "Kullback-Leibler divergence of the file's next-token distribution from its PyTorch "
        "model's, averaged over tokens; prefill in one pass, decode token by token.",
    ),
]


def method(data: ReportData) -> Facts:
    """Workload, order and machine, as they were in force."""
    found = next((e.measurement for e in data.entries if e.measurement), None)
    facts: Facts = []
    if found is not None:
        w = found.workload
        facts += [
            (
                "Workload",
                f"{w.prompt_tokens} prompt tokens, {w.decode_tokens} decode steps, batch 1, "
                f"{w.repeats} timed and {w.memory_repeats} memory trials a file, "
                f"{w.threads} {'thread' if w.threads == 1 else 'threads'}",
            ),
            (
                "Warm-up",
                f"{min(w.warmup_prompt_tokens, w.prompt_tokens)} prompt tokens, "
                f"{w.warmup_decode_tokens} decode steps in each process, not counted",
            ),
            ("Prompt", f"{found.prompt_source}, token ids SHA-256 {found.prompt_sha256[:16]}…"),
            ("Order", f"{found.protocol.get('order', NONE)}; seed {found.protocol.get('seed')}"),
            ("Processes", "each trial in a fresh process, one at a time, the parent blocked"),
        ]
        facts += [("Memory by", m.method) for m in found.memory[:1]]
    return [*facts, *_machine(data)]


def origin(data: ReportData) -> Facts:
    """What everything was made from."""
    facts: Facts = [("Model", _model(data.model)), ("Source", data.model.source)]
    facts.append(("SHA-256", data.model.sha256))
    if data.pruned is not None:
        facts.append((f"Pruned, {cut_words(data) or 'nothing cut'}", _model(data.pruned)))
        facts.append(("Pruned SHA-256", data.pruned.sha256))
    if data.plan is not None:
        dropped = ", ".join(map(str, data.plan["drop"])) or "none"
        facts.append(("Plan", f"method {data.plan['method']}, dropped layers: {dropped}"))
    if data.quality is not None:
        q = data.quality
        facts.append(("Test text", f"{q.text_source}, {q.n_tokens} tokens"))
    facts += [
        (f"File, {_which(e)}", e.artifact["sha256"]) for e in _once(data.entries) if e.artifact
    ]
    versions = {"shortstack": data.tool_version, **data.versions}
    facts.append(("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    if data.command:
        facts.append(("Command", data.command))
    if data.created_at:
        facts.append(("Made", data.created_at))
    return facts


def recipe_text(data: ReportData) -> str | None:
    return None if data.recipe is None else json.dumps(data.recipe, indent=2, ensure_ascii=False)


def failures(data: ReportData) -> Facts:
    """Everything that did not work, in its own words."""
    found: Facts = []
    for entry in data.entries:
        where = f"{spec_name(entry)}, {entry.runtime}, {entry.label}"
        if entry.failure:
            found.append((where, entry.failure))
        if entry.measurement and (failed := entry.measurement.failure):
            found.append((where, f"during {failed.phase}: {failed.message}"))
    return found


def warnings(data: ReportData) -> Facts:
    """What makes a figure less trustworthy."""
    return [
        (f"{spec_name(e)}, {e.runtime}, {e.label}", flag)
        for e in data.entries
        if e.measurement
        for flag in e.measurement.flags
    ]


def notes(data: ReportData) -> Facts:
    """What the exporter wants known about a file."""
    return [
        (_which(e), note)
        for e in _once(data.entries)
        if e.artifact
        for note in e.artifact.get("notes", ())
    ]


def _machine(data: ReportData) -> Iterator[tuple[str, str]]:
    host = data.host
    cpu = host.get("cpu") or {}
    if cpu:
        governor = cpu.get("governor")
        yield (
            "CPU",
            f"{cpu.get('model') or 'unknown'}, {cpu.get('physical_cores')} physical and "
            f"{cpu.get('logical_cores')} logical cores, {cpu.get('usable_cores')} to be used"
            + (f", governor {governor}" if governor else ""),
        )
        yield "Instruction sets", ", ".join(cpu.get("isa") or ()) or NONE
    if host.get("ram_bytes"):
        yield "RAM", f"{number(host['ram_bytes'] / 1e9)} GB"
    if host.get("os"):
        yield "System", ", ".join(filter(None, (host["os"], host.get("kernel"), _boxed(data))))


def _boxed(data: ReportData) -> str | None:
    container, virtual = data.host.get("container"), data.host.get("hypervisor")
    words = [f"in a {container} container" if container else "", "virtual machine" * bool(virtual)]
    return ", ".join(filter(None, words)) or None


def _model(facts: ModelFacts) -> str:
    size = f", {megabytes(facts.n_bytes)} MB" if facts.n_bytes else ""
    return (
        f"{facts.name}, {facts.n_layers} layers, {number(facts.n_params / 1e6)} M parameters{size}"
    )


def _which(entry: Entry) -> str:
    return f"{spec_name(entry)}, {entry.label}"


def _once(entries: Sequence[Entry]) -> list[Entry]:
    """One entry a file: a file may have been opened by two runtimes."""
    files = {(e.spec, e.label): e for e in reversed(entries) if e.artifact is not None}
    return list(reversed(files.values()))
