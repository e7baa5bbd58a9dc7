"""The command `shortstack unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, Out, QuietOption, Text, answer, user_errors


@user_errors
def unpack(
    model: Annotated[Path, typer.Argument(help="A packed file, from export --to packed.")],
    out: Out,
    to: Annotated[
        str, typer.Option(help="hf (the folder, bit for bit), gguf:Q8_0, onnx:int8.")
    ] = "hf",
    text: Text = "spdx",
    max_perplexity_ratio: Annotated[float, typer.Option(help="Gate of a quantized file.")] = 1.25,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Unpack a packed model: the very folder it was made of, or a file for another runtime."""
    from shortstack import terminal
    from shortstack.commands import packed as packed_commands
    from shortstack.devices.host import usable_cores

    result = packed_commands.unpack(
        model,
        to,
        out,
        text=text,
        max_perplexity_ratio=max_perplexity_ratio,
        threads=threads or usable_cores(),
        display=terminal.display(quiet or as_json),
    )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))
