"""The command `shortstack heal`."""

from __future__ import annotations

from pathlib import Path
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


@user_errors
def heal(
    student: Annotated[str, typer.Argument(help="The cut model: a Hugging Face folder.")],
    text: TrainText,
    out: Out,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on, repeats counted.")],
    teacher: Annotated[
        str | None, typer.Option(help="The model that was cut: a folder, .gguf, pkg: or hf:.")
    ] = None,
    general: General = None,
    share: Share = 0.5,
    rate: Rate = 3e-4,
    train: Annotated[str, typer.Option(help="all, lora:8, layers:3,4 or neighbours.")] = "all",
    loss: Annotated[str, typer.Option(help="kl (to the teacher), ce (the text) or mix.")] = "kl",
    alpha: Annotated[float, typer.Option(help="Weight of kl in mix.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of both models in kl.")] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Teacher's tokens that count one by one; default: all."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the teacher's --top-k tokens.")
    ] = None,
    self_generated_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that the teacher writes, more text to train on.")
    ] = 0,
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
    keep_float32: Annotated[bool, typer.Option(help="Store what was trained in float32.")] = False,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a cut model towards the model it was cut from; keep the best state."""
    from shortstack import terminal
    from shortstack.commands import heal as heal_commands
    from shortstack.prune.heal.settings import HealSettings

    with naming_options(learning_rate="rate"):
        settings = HealSettings(
            tokens=tokens,
            window_tokens=window_tokens,
            batch_windows=batch_windows,
            micro_windows=micro_windows,
            learning_rate=rate,
            warmup=warmup,
            final_rate=final_rate,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
            loss=loss,  # type: ignore[arg-type]  # checked by the settings
            alpha=alpha,
            temperature=temperature,
            top_k=top_k,
            train=train,
            eval_steps=eval_steps,
            save_steps=save_steps,
            keep_float32=keep_float32,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    wanted = heal_commands.HealText(
        *(tuple(text), tuple(general or ()), share, selection_windows, self_generated_tokens)
    )
    result = heal_commands.heal_model(
        *(student, teacher, wanted, out, settings),
        cache=cache,
        display=terminal.display(quiet or as_json or not heal_commands.is_first()),
    )
    if heal_commands.is_first():
        answer(result, as_json, lambda: terminal.print_facts(result, quiet))


@user_errors
def streamline(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder.")],
    drop: Annotated[int, typer.Option(min=1, help="How many layers shall go.")],
    text: TrainText,
    out: Out,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train the replacement on.")],
    objective: Annotated[str, typer.Option(help="mse (hidden states) or lm (the text).")] = "mse",
    replacement: Annotated[str, typer.Option(help="layer, swiglu or none.")] = "layer",
    general: General = None,
    share: Share = 0.5,
    rate: Rate = 2e-4,
    window_tokens: WindowTokens = 512,
    batch_windows: BatchWindows = 16,
    micro_windows: MicroWindows = None,
    selection_windows: SelectionWindows = 32,
    eval_steps: EvalSteps = None,
    save_steps: SaveSteps = None,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put one trained layer in the place of the run that changes least (LLM-Streamline)."""
    from shortstack import terminal
    from shortstack.commands import heal as heal_commands
    from shortstack.prune.heal.settings import HealSettings

    with naming_options(learning_rate="rate"):
        settings = HealSettings(
            tokens=tokens,
            window_tokens=window_tokens,
            batch_windows=batch_windows,
            micro_windows=micro_windows,
            learning_rate=rate,
            final_rate=0.25,  # the paper's code: 2e-4 to 5e-5
            weight_decay=1e-3,
            grad_clip=5.0,
            loss="ce",
            eval_steps=eval_steps,
            save_steps=save_steps,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    wanted = heal_commands.HealText(tuple(text), tuple(general or ()), share, selection_windows)
    result = heal_commands.streamline_model(
        *(model, drop, wanted, out, settings),
        objective=objective,
        replacement=replacement,
        display=terminal.display(quiet or as_json),
    )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))
