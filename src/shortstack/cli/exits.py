"""The commands `shortstack exits`: train, export, choose."""

from __future__ import annotations

from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, Out, QuietOption, answer, naming_options, user_errors
from shortstack.cli.training import (
    BatchWindows,
    Device,
    Dtype,
    EvalSteps,
    FinalRate,
    General,
    MicroWindows,
    Rate,
    SaveSteps,
    SelectionWindows,
    Share,
    TrainText,
    Warmup,
    WindowTokens,
)

app = typer.Typer(
    help="Leave a model before its last layer: trained exits (Balcony), fitted rules (AdaInfer).",
    no_args_is_help=True,
)
Folder = Annotated[str, typer.Argument(help="A folder of exits, or a model's that holds them.")]
Base = Annotated[str | None, typer.Option(help="The model of the exits, where it was moved.")]


@app.command()
@user_errors
def train(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder; it stays as it is.")],
    at: Annotated[str, typer.Option(help="Behind how many layers exits stand: 8,15,22.")],
    text: TrainText,
    out: Out,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens to train on, repeats counted.")] = 0,
    init: Annotated[
        str,
        typer.Option(
            help="last (a copy of the last layer), random, norm-only (no layer), none (logit lens)."
        ),
    ] = "last",
    general: General = None,
    share: Share = 0.5,
    lr: Rate = 1e-3,
    window_tokens: WindowTokens = 512,
    batch_windows: BatchWindows = 16,
    micro_windows: MicroWindows = None,
    selection_windows: SelectionWindows = 32,
    warmup: Warmup = 0.05,
    final_rate: FinalRate = 0.1,
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    eval_steps: EvalSteps = None,
    save_steps: SaveSteps = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse passes over logits (wants a C++ compiler).")
    ] = False,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train exits towards the model's own distribution, all from one pass of the frozen model."""
    from shortstack import terminal
    from shortstack.commands import exits as exit_commands
    from shortstack.commands.heal import HealText
    from shortstack.exits.folder import parse_exits
    from shortstack.prune.heal.settings import HealSettings

    with naming_options(learning_rate="lr"):
        settings = HealSettings(
            tokens=tokens,
            window_tokens=window_tokens,
            batch_windows=batch_windows,
            micro_windows=micro_windows,
            learning_rate=lr,
            warmup=warmup,
            final_rate=final_rate,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
            eval_steps=eval_steps,
            save_steps=save_steps,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    result = exit_commands.train(
        model,
        parse_exits(at),
        HealText(tuple(text), tuple(general or ()), share, selection_windows),
        out,
        settings,
        init=init,
        compiled=compiled,
        display=terminal.display(quiet or as_json),
    )
    answer(result, as_json, lambda: terminal.print_depths(result, quiet))


@app.command()
@user_errors
def export(
    exits: Folder,
    out: Out,
    exit: Annotated[int, typer.Option(help="Which exit: behind how many layers.")],
    model: Base = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an exit as a Hugging Face folder of k + 1 layers, for every command and tool."""
    from shortstack import terminal
    from shortstack.commands import exits as exit_commands

    show = terminal.display(quiet or as_json)
    result = exit_commands.write(exits, exit, out, model=model, display=show)
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))


@app.command()
@user_errors
def choose(
    exits: Folder,
    max_latency_ms: Annotated[float, typer.Option(help="From the prompt to the last new token.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 1,
    model: Base = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what a layer costs here; say the deepest exit that keeps to a budget."""
    from shortstack import terminal
    from shortstack.commands import exits as exit_commands
    from shortstack.devices.host import usable_cores

    result = exit_commands.choose(
        exits,
        max_latency_ms,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        model=model,
        dtype=dtype,
        device=device,
        threads=threads or usable_cores(),
    )
    answer(result, as_json, lambda: terminal.print_depths(result, quiet))
