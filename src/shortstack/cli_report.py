"""`shortstack report`: a run's report written again, or the records of many machines merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli_shared import JsonOption, QuietOption, answer, user_errors

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


@user_errors
def report(
    folders: Folders,
    out: Out = None,
    evaluation: Evaluations = None,
    merge: Merge = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge records of many machines into one report: HTML, Markdown, CSV, llama-bench's JSON.

    One folder of shortstack run alone: write that run's own report again.
    """
    from shortstack import commands, report_commands, terminal

    if not merge and not evaluation and report_commands.is_one_run(folders, out):
        result = commands.report(folders[0], out or folders[0])
    else:
        result = report_commands.merge_reports(folders, evaluation or (), out)
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))
