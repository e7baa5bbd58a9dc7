"""`shortstack exits fit`, and `shortstack eval` where it is given an early exit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortstack.cli.evaluate import BatchTokens, Context, Device, Dtype
from shortstack.cli.shared import (
    JsonOption,
    Model,
    Out,
    QuietOption,
    answer,
    naming_options,
    user_errors,
)
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.evaluate.targets import Loading


@user_errors
def fit(
    model: Model,
    tune: Annotated[Path, typer.Option(help="Questions to fit to: .jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    validation: Annotated[
        Path | None, typer.Option(help="Questions for the threshold. Default: a third of tune.")
    ] = None,
    max_accuracy_loss: Annotated[
        float, typer.Option(help="Accuracy that may be lost on them, as 0.01.")
    ] = 0.01,
    max_changed: Annotated[
        float | None, typer.Option(help="Share of answers that may change, as 0.05.")
    ] = None,
    check: Annotated[
        str, typer.Option(help="answers, probe (answers alike in all rows), or vocabulary.")
    ] = "answers",
    classifier: Annotated[
        str, typer.Option(help="logistic, svm, or top (a fixed threshold).")
    ] = "logistic",
    every: Annotated[int, typer.Option(min=1, help="Layers between checks.")] = 2,
    first: Annotated[int, typer.Option(min=1, help="Layers before the first check.")] = 2,
    check_cost: Annotated[
        float | None,
        typer.Option(help="Time of a check, in layers, as 0.25. Default: measured here."),
    ] = None,
    answers: Annotated[str, typer.Option(help="words, letters, or auto.")] = "auto",
    shots: Annotated[int, typer.Option(min=0, help="Examples from tune before a prompt.")] = 0,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of a file, at most.")] = None,
    seed: int = 0,
    context: Context = 2048,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_tokens: BatchTokens = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit when prompts may leave a model before its last layer (AdaInfer)."""
    from shortstack import terminal
    from shortstack.commands import early_exit as commands
    from shortstack.devices.host import usable_cores
    from shortstack.evaluate.targets import Loading

    settings = {
        **{"check": check, "classifier": classifier, "every": every, "first": first},
        **{"max_accuracy_loss": max_accuracy_loss, "max_changed": max_changed},
        "check_cost": check_cost,
    }
    loading = Loading(context, threads or usable_cores(), device, dtype, batch_tokens)
    with naming_options():
        result = commands.fit_exit(
            *(model, tune, validation, settings, out, loading),
            answers=answers,
            shots=shots,
            rows=rows,
            seed=seed,
            display=terminal.display(quiet or as_json),
        )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))


@user_errors
def split(
    export: Annotated[Path, typer.Argument(help="The folder of an export to ONNX.")],
    early_exit: Annotated[Path, typer.Option(help="An early exit with a probe, from exits fit.")],
    out: Out,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut an ONNX export where an early exit checks, for onnxruntime."""
    from shortstack import terminal
    from shortstack.commands import early_exit as commands

    show = terminal.display(quiet or as_json)
    result = commands.split_export(export, early_exit, out, display=show)
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))


def evaluate_early_exit(
    models: Sequence[str],
    choice: Sequence[Path],
    classifier: Path,
    loading: Loading,
    out: Path,
    *,
    limit: int | None,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """What `shortstack eval --early-exit` does in the place of the usual scores."""
    from shortstack import early_exit_report, terminal
    from shortstack.commands import early_exit_eval as commands

    if len(models) != 1:
        raise ShortstackError("--early-exit is of one model. Name that alone.")
    if not choice:
        raise ShortstackError("--early-exit answers questions. Give some with --choice.")
    show = terminal.display(quiet or as_json)
    result = commands.evaluate_exit(
        *(models[0], choice, classifier, loading, out), limit=limit, seed=seed, display=show
    )
    answer(result, as_json, lambda: early_exit_report.show(result, quiet))
