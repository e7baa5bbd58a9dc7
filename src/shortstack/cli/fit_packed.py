"""The command `shortstack fit-packed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, QuietOption, answer, user_errors


@user_errors
def fit_packed(
    model: Annotated[Path, typer.Argument(help="A packed file, or the folder of its export.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the plan goes, plan.json.")],
    memory_budget_mb: Annotated[
        float | None, typer.Option(min=0, help="Weights and buffers at most, 10^6 bytes.")
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(min=1, help="Time of a token at most, over the int8 form's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that decode ahead.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    points: Annotated[int, typer.Option(min=0, help="Plans of the curve to measure.")] = 5,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure each form of a packed model's matrices here, and choose which stay uncoded."""
    from shortstack import terminal
    from shortstack.commands import fit_packed as command
    from shortstack.devices.host import usable_cores

    result = command.fit_packed(
        model,
        out,
        memory_budget_mb=memory_budget_mb,
        max_slowdown=max_slowdown,
        threads=threads or usable_cores(),
        workers="auto" if workers is None else str(workers),
        device=device,
        points=points,
        display=terminal.display(quiet or as_json),
    )
    answer(result, as_json, lambda: _show(result, quiet))


def _show(result: dict[str, object], quiet: bool) -> None:
    if not quiet:
        typer.echo(str(result["table"]))
    typer.echo(f"plan: {result['plan']}")
