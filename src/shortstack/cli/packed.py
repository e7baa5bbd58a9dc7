"""The command `shortstack unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, Out, QuietOption, Text, Zst, answer, user_errors
from shortstack.errors import ShortstackError


@user_errors
def unpack(
    model: Annotated[
        Path, typer.Argument(help="A packed file, the folder of its export, or a catalogue's.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    to: Annotated[
        str, typer.Option(help="hf (the folder, bit for bit), gguf:Q8_0, onnx:int8.")
    ] = "hf",
    variant: Annotated[str | None, typer.Option(help="Which of a catalogue's models.")] = None,
    text: Text = "spdx",
    max_perplexity_ratio: Annotated[float, typer.Option(help="Gate of a quantized file.")] = 1.25,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    zst: Zst = False,
    check: Annotated[
        bool, typer.Option(help="Only hold it against its checksums; write nothing.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Unpack a packed model: the very folder it was made of, or a file for another runtime."""
    from shortstack import terminal
    from shortstack.commands import packed as packed_commands
    from shortstack.devices.host import usable_cores

    display = terminal.display(quiet or as_json)
    if check == (out is not None):
        raise ShortstackError("say where to: -o FOLDER, or --check to write nothing. One of them.")
    if out is None:
        result = packed_commands.check(model, variant=variant, display=display)
    else:
        result = packed_commands.unpack(
            model,
            to,
            out,
            variant=variant,
            zst=zst,
            text=text,
            max_perplexity_ratio=max_perplexity_ratio,
            threads=threads or usable_cores(),
            display=display,
        )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))


@user_errors
def catalogue(
    models: Annotated[list[str], typer.Argument(help="Models, each as MODEL or NAME=MODEL.")],
    out: Out,
    option: Annotated[list[str] | None, typer.Option(help="coder=... or effort=...")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Store variants of a model in one folder, packed, each equal tensor once."""
    from shortstack import terminal
    from shortstack.commands import packed as packed_commands

    display = terminal.display(quiet or as_json)
    result = packed_commands.catalogue(models, out, option or [], display)
    answer(result, as_json, lambda: terminal.print_catalogue(result, quiet))
