"""The command line: one command a stage, `run` for all. The only place that prints and that
turns errors into exit codes: 0 done, 1 an artifact failed its verification, 2 the user can mend it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shortstack import __version__
from shortstack.cli import bench as cli_bench
from shortstack.cli import early_exit as cli_early_exit
from shortstack.cli import evaluate as cli_eval
from shortstack.cli import exits as cli_exits
from shortstack.cli import fit_packed as cli_fit_packed
from shortstack.cli import heal as cli_heal
from shortstack.cli import lm_eval as cli_lm_eval
from shortstack.cli import packed as cli_packed
from shortstack.cli import quantize as cli_quantize
from shortstack.cli import repair as cli_repair
from shortstack.cli import report as cli_report
from shortstack.cli import trim as cli_trim
from shortstack.cli.shared import (
    DryRun,
    JsonOption,
    Model,
    Out,
    QuietOption,
    Text,
    Zst,
    answer,
    user_errors,
)

app = typer.Typer(
    help="Make a language model shallower, export it, prove the export, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Drop = Annotated[
    str, typer.Option(help="How many layers a method shall choose, or which: 11-15,20.")
]
Method = Annotated[
    str,
    typer.Option(
        help="How layers are chosen: influence, angular, cosine-run, taylor, perplexity, greedy, "
        "repaired, sub-block, repaired-sub-block, shapley, laco (merges), every, last, random; "
        "or explicit."
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="Of the method, NAME=VALUE, e.g. screen=0 or protect_last=2."),
]


@app.command()
@user_errors
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe such as demo.")],
    out: Out,
    dry_run: DryRun = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do everything a recipe says: plan, cut, export, verify, measure, report."""
    from shortstack import pipeline, terminal
    from shortstack.forecast import forecast
    from shortstack.recipe import load_recipe

    loaded = load_recipe(recipe)
    if dry_run:
        expected = forecast(loaded)
        answer(expected, as_json, lambda: terminal.print_forecast(expected))
        return
    command = f"shortstack run {recipe} -o OUT"
    result = pipeline.run(loaded, out, terminal.display(quiet or as_json), command)
    answer(result, as_json, lambda: terminal.print_run(result, quiet))
    if result["failures"]:
        raise typer.Exit(1)


@app.command()
@user_errors
def plan(
    model: Model,
    drop: Drop,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")],
    method: Method = "perplexity",
    text: Text = "spdx",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 8,
    window_tokens: Annotated[int, typer.Option(min=8, help="Tokens a window.")] = 256,
    option: MethodOption = None,
    dry_run: DryRun = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the layers to drop; write the choice and its scores as JSON."""
    from shortstack import terminal
    from shortstack.commands import stages
    from shortstack.recipe import PruneRecipe, part

    choice = part(
        PruneRecipe,
        method=method,
        drop=drop,
        windows=windows,
        window_tokens=window_tokens,
        options=stages.typed_options(option or ()),
    )
    result = stages.plan(
        model, choice, text, out, dry_run=dry_run, display=terminal.display(quiet or as_json)
    )
    answer(result, as_json, lambda: terminal.print_plan(result, quiet))


@app.command()
@user_errors
def prune(
    model: Model,
    out: Out,
    drop: Annotated[str | None, typer.Option(help="Layers to drop: 11-15,20.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file, from shortstack plan.")] = None,
    dry_run: DryRun = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut layers out of a model; the result is a plain Hugging Face folder, or, where MODEL and
    OUT are .gguf files, a GGUF file with its quantized bytes untouched."""
    from shortstack import terminal
    from shortstack.commands import gguf_cut as gguf_commands
    from shortstack.commands import stages

    cut = gguf_commands.cut_model if gguf_commands.wanted(model, out) else stages.prune_model
    result = cut(
        model, drop, plan, out, dry_run=dry_run, display=terminal.display(quiet or as_json)
    )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))


@app.command()
@user_errors
def export(
    model: Model,
    to: Annotated[
        str, typer.Option(help="FORMAT:PRECISION, e.g. gguf:Q8_0 or onnx:int4; or packed.")
    ],
    out: Out,
    exit: Annotated[
        int | None,
        typer.Option(help="Of a folder with exits: which, by its layers. Also MODEL@15."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, e.g. head=Q6_K.")] = None,
    text: Text = "spdx",
    max_perplexity_ratio: Annotated[float, typer.Option(help="Gate of a quantized file.")] = 1.25,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    zst: Zst = False,
    dry_run: DryRun = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model and prove the artifact against PyTorch in its own runtime."""
    from shortstack import terminal
    from shortstack.commands import stages
    from shortstack.devices.host import usable_cores
    from shortstack.recipe import ExportRecipe, part

    options = dict(stages.split_option(item) for item in option or ())
    wanted = part(ExportRecipe, to=to, options=options, max_perplexity_ratio=max_perplexity_ratio)
    result = stages.export(
        stages.exit_of(model, exit),
        wanted,
        text,
        out,
        threads=threads or usable_cores(),
        dry_run=dry_run,
        zst=zst,
        display=terminal.display(quiet or as_json),
    )
    answer(result, as_json, lambda: terminal.print_export(result, quiet))


@app.command()
@user_errors
def doctor(as_json: JsonOption = False) -> None:
    """Try every runtime on every device; say what is missing and what to do."""
    from shortstack import terminal
    from shortstack.devices.listing import survey
    from shortstack.doctor import examine
    from shortstack.doctor.findings import healthy

    findings = examine()
    data = {
        "findings": [finding.to_dict() for finding in findings],
        "healthy": healthy(findings),
        **survey(),
    }
    answer(data, as_json, lambda: terminal.print_findings(findings))
    if not data["healthy"]:
        raise typer.Exit(2)


app.command()(cli_bench.bench)
cli_exits.app.command()(cli_early_exit.fit)
cli_exits.app.command()(cli_early_exit.split)
app.add_typer(cli_exits.app, name="exits")
app.command()(cli_heal.heal)
app.command("eval")(cli_eval.evaluate)
app.command()(cli_quantize.quantize)
app.command()(cli_repair.repair)
app.command()(cli_report.report)
app.command()(cli_trim.trim)
app.command()(cli_packed.unpack)
app.command()(cli_packed.catalogue)
app.command("fit-packed")(cli_fit_packed.fit_packed)
app.command()(cli_heal.streamline)
app.command("lm-eval", context_settings=cli_lm_eval.SETTINGS)(cli_lm_eval.lm_eval)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shortstack {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        app(args=args, prog_name="shortstack")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
