"""The command `shortstack repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, Out, QuietOption, Text, answer, user_errors


@user_errors
def repair(
    pruned: Annotated[Path, typer.Argument(help="A folder that shortstack prune made.")],
    of: Annotated[str, typer.Option("--of", help="The model it was cut from.")],
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            help="auto (try all), folded (those that add no layer), or one of bias, scale, "
            "least-squares, patch, ghost, refit."
        ),
    ] = "auto",
    text: Text = "spdx",
    windows: Annotated[int, typer.Option(min=4, help="Windows to fit on.")] = 32,
    window_tokens: Annotated[int, typer.Option(min=8, help="Tokens a window.")] = 256,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Repair a cut without training: fold what the dropped layers did on average into weights."""
    from shortstack import terminal
    from shortstack.commands import repair as repair_commands

    result = repair_commands.repair_model(
        pruned,
        of,
        method,
        text,
        out,
        windows=windows,
        window_tokens=window_tokens,
        display=terminal.display(quiet or as_json),
    )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))
