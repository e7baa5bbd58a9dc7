"""`shortstack report`: a run's report written again, or the records of many machines merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, QuietOption, answer, user_errors

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR...",
        help="Folders of shortstack bench or run, or their bench.json and report.json.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Where the result goes; only the report of one run may do without."
    ),
]
Evaluations = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval", help="Quality of the artifacts: the folder or eval.json of shortstack eval."
    ),
]
Merge = Annotated[bool, typer.Option("--merge", help="Merge, even if it is one run alone.")]

Project = Annotated[
    list[str] | None,
    typer.Option(
        help="A device that is not at hand, to tell what it would do: rtx-4090, h100-sxm, all."
    ),
]


@user_errors
def report(
    folders: Folders,
    out: Out = None,
    evaluation: Evaluations = None,
    project: Project = None,
    merge: Merge = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge records of many machines into one report: HTML, Markdown, CSV, llama-bench's JSON.

    One folder of shortstack run alone: write that run's own report again.
    """
    from shortstack import terminal
    from shortstack.commands import report as report_commands
    from shortstack.commands import stages

    alone = not (merge or evaluation or project)
    if alone and report_commands.is_one_run(folders, out):
        result = stages.report(folders[0], out or folders[0])
    else:
        result = report_commands.merge_reports(folders, evaluation or (), out, project or ())
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))
