"""Options that every command has which trains on text."""

from __future__ import annotations

from typing import Annotated

import typer

TrainText = Annotated[
    list[str], typer.Option(help="Your text: a file, spdx, or a folder with splits.")
]
General = Annotated[list[str] | None, typer.Option(help="General text, mixed in.")]
Share = Annotated[float, typer.Option(min=0, max=1, help="Share of general text.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
WindowTokens = Annotated[int, typer.Option(min=8, help="Tokens a window.")]
BatchWindows = Annotated[int, typer.Option(min=1, help="Windows a step.")]
MicroWindows = Annotated[int | None, typer.Option(min=1, help="Windows run at once.")]
SelectionWindows = Annotated[
    int, typer.Option(min=1, help="Windows of other text that choose the state that is kept.")
]
EvalSteps = Annotated[
    int | None, typer.Option(min=1, help="Steps between such choices; default: a tenth.")
]
SaveSteps = Annotated[
    int | None, typer.Option(min=1, help="Steps between states; default: two minutes.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16 (autocast).")]
Device = Annotated[str, typer.Option(help="auto or cpu.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps with a rising rate.")]
FinalRate = Annotated[float, typer.Option(help="Last rate as a share of the highest.")]
