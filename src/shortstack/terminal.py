"""What a person sees while a step runs: one bar a step, with time left; or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shortstack.progress import Display, OnProgress, Quiet

if TYPE_CHECKING:
    from rich.console import Console

    from shortstack.doctor.findings import Finding


class Terminal:
    """A Display with rich bars on standard error, so that standard output can be piped."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[OnProgress]:
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=None)

            def show(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            yield show
            # Whatever the step reported last, it has ended well.
            total = bars.tasks[0].total or 1
            bars.update(task, completed=total, total=total)

    def note(self, text: str) -> None:
        from rich.markup import escape  # a file's name may hold brackets

        self.console.print(f"  [dim]{escape(text)}", highlight=False, soft_wrap=True)


def display(quiet: bool) -> Display:
    if quiet:
        return Quiet()
    from rich.console import Console

    return Terminal(Console(stderr=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; all columns but the first are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_forecast(data: Mapping[str, Any]) -> None:
    """What a run would write, step by step."""
    rows = [
        (row["step"], *(megabytes(row[k]) for k in ("size_bytes", "peak_ram_bytes", "disk_bytes")))
        for row in data["steps"]
    ]
    whole, *cut = map(str, data["n_layers"].values())
    title = f"{data['model']}: {whole} layers{' to ' * bool(cut)}{', '.join(cut)}"
    print_table(title, ("step", "size", "peak RAM", "disk at worst"), rows)
    print_facts({k: v for k, v in data.items() if k.endswith("_bytes")}, quiet=False)


def print_plan(data: Mapping[str, Any], quiet: bool) -> None:
    """The scores of all layers, the dropped ones marked."""
    scores = data.get("scores") or ()
    if scores and not quiet:
        dropped = set(data["drop"])
        rows = [
            (str(n), "protected" if s is None else f"{s:.4f}", "drop" if n in dropped else "")
            for n, s in enumerate(scores)
        ]
        print_table(f"{data['method']}: higher means keep", ("layer", "score", ""), rows)
    print_facts({k: v for k, v in data.items() if k not in ("scores", "facts", "schema")}, quiet)


def print_run(data: Mapping[str, Any], quiet: bool) -> None:
    """The figures of a run in one table, what failed, and where the report is."""
    if data["comparisons"] and not quiet:
        rows = [
            (
                f"{c['spec']} in {c['runtime']}" + f", {c['label']}" * (c["label"] != "pruned"),
                _times(c["decode_speedup"]),
                _ratio(c["bytes_per_token_ratio"]),
                _ratio(c["size_ratio"]),
                _ratio(c["peak_memory_ratio"]),
            )
            for c in data["comparisons"]
        ]
        columns = (
            "original / other",
            "decode speed-up",
            "bytes a token",
            "size",
            "peak memory",
        )
        print_table("What less depth gained", columns, rows)
    if data["perplexity"] and not quiet:
        before, after = data["perplexity"]["original"], data["perplexity"]["pruned"]
        print_facts({"perplexity": f"{before:.2f} to {after:.2f} ({after / before:.2f} x)"}, quiet)
    for title, names, lines in data["tables"] if not quiet else ():
        print_table(title, names, lines)
    print_facts({"failures": data["failures"] or "none", "report": data["report"]}, quiet=False)


def print_facts(data: Mapping[str, Any], quiet: bool) -> None:
    """One line a fact; nested facts stay in the files."""
    from rich.console import Console

    if quiet:
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, value in data.items():
        if value is not None and not _nested(value):
            words = megabytes(value) if name.endswith("_bytes") else _words(value)
            console.print(f"{name}: {words}", markup=False)


def print_depths(data: Mapping[str, Any], quiet: bool) -> None:
    """Facts, and those that each exit has of its own: `kl: 1.02 at 8, 0.64 at 15`."""
    print_facts(data, quiet)
    if quiet:
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for name, value in data.items():
        if isinstance(value, dict):
            words = ", ".join(f"{_words(number)} at {depth}" for depth, number in value.items())
            console.print(f"{name}: {words}", markup=False)


def print_export(data: Mapping[str, Any], quiet: bool) -> None:
    """The facts of an export, what it is to be known for, and the table of a packed one."""
    print_facts(data, quiet)
    if quiet or not data.get("worth"):
        return
    from rich.console import Console
    from rich.table import Table

    heads = ("tensors", "kind", "entropy", "coded", "MB", "ratio", "in", "out", "why")
    table = Table(*heads, box=None, pad_edge=False)
    for row in data["worth"]:
        speeds = [f"{row[name]:,.0f} MB/s" for name in ("encode_mb_s", "decode_mb_s")]
        table.add_row(
            f"{row['n_tensors']} x {row['tensors'].removesuffix('.weight')}",
            f"{row['kind']} {row['coders']}",
            f"{row['entropy_bits']:.2f} b",
            f"{row['coded_bits']:.2f} b",
            f"{row['coded_bytes'] / 1e6:.1f}",
            f"{row['ratio']:.2f} x",
            *speeds,
            row["reason"],
        )
    console = Console(highlight=False, width=160)  # a cut cell is worse than a wrapped line
    console.print(table)
    for note in data["artifact"]["notes"]:
        console.print(note, markup=False)


def print_catalogue(data: Mapping[str, Any], quiet: bool) -> None:
    """What each variant of a catalogue costs."""
    print_facts(data, quiet)
    if quiet:
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for row in data["variants"]:
        console.print(
            f"{row['name']}: {row['coded_bytes'] / 1e6:,.1f} MB alone, "
            f"{row['new_bytes'] / 1e6:,.1f} MB added ({row['n_shared']} of {row['n_tensors']} "
            f"tensors shared); unpacked {row['plain_bytes'] / 1e6:,.1f} MB",
            markup=False,
        )


def _nested(value: Any) -> bool:
    """Facts within a fact, or a list of them, such as every step of a training."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Mapping)


def _words(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_findings(findings: Sequence[Finding]) -> None:
    """What the doctor found, and what to do about it."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    signs = {
        "ok": "[green]ok     [/]",
        "warning": "[yellow]warning[/]",
        "problem": "[red]problem[/]",
    }
    for finding in findings:
        console.print(signs[finding.status], end=" ")
        console.print(f"{finding.name}: {finding.fact}", markup=False)
        if finding.next_step:
            console.print(f"        {finding.next_step}", markup=False)


def megabytes(n_bytes: float | None) -> str:
    return "?" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB"


def _times(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval['estimate']:.2f} x ({interval['low']:.2f} to {interval['high']:.2f})"


def _ratio(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f} x"
