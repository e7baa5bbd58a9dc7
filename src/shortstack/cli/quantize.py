"""The command `shortstack quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from shortstack.cli.shared import (
    JsonOption,
    Model,
    Out,
    QuietOption,
    Text,
    answer,
    naming_options,
    user_errors,
)


@user_errors
def quantize(
    model: Model,
    out: Out,
    bits: Annotated[float, typer.Option(help="Bits a weight of the file, all counted.")] = 4.0,
    method: Annotated[
        str, typer.Option(help="compensated (by calibration text), or plain (none needed).")
    ] = "compensated",
    text: Text = "spdx",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    window_tokens: Annotated[int, typer.Option(min=8, help="Tokens a window.")] = 512,
    rate_weight: Annotated[
        float, typer.Option(help="Prefer smaller codes that save bits; 1: at the price of a step.")
    ] = 0.0,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Instead of --bits: fewest bits with at most so many times perplexity."),
    ] = None,
    tune_steps: Annotated[
        int, typer.Option(min=0, help="Batches that row steps and norms learn from; 0: none.")
    ] = 12,
    learn_tokens: Annotated[
        int, typer.Option(min=0, help="Text that codes learn from, in its place; best on a card.")
    ] = 0,
    self_generated_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens more to learn from that the model writes itself.")
    ] = 0,
    learning_rate: Annotated[
        float, typer.Option(help="By how much of a step a code learns in a batch.")
    ] = 0.003,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens a batch of learning.")] = 8192,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the tokens that sensitivities are drawn with.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Round weights to codes that an entropy coder makes small; a Hugging Face folder as before."""
    from shortstack import terminal
    from shortstack.commands import quantize as quantize_commands
    from shortstack.prune.quantize import QuantizeSettings

    with naming_options():
        settings = QuantizeSettings(
            *(bits, method, rate_weight, seed, tune_steps),
            *(learn_tokens, learning_rate, batch_tokens, device),
        )
    display = terminal.display(quiet or as_json)
    result = quantize_commands.quantize_model(
        *(model, text, out, settings),
        windows=windows,
        window_tokens=window_tokens,
        display=display,
        max_perplexity_ratio=max_perplexity_ratio,
        self_generated_tokens=self_generated_tokens,
    )

    def show() -> None:
        if not quiet:
            columns = ("", "weights", "bits a weight", "zeros")
            terminal.print_table(
                "As an entropy coder has it", columns, quantize_commands.table(result)
            )
        terminal.print_facts(result, quiet)

    answer(result, as_json, show)
