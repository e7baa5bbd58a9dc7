"""`shortstack eval`: how good models and artifacts are, on your rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli_shared import JsonOption, Out, QuietOption, answer, user_errors

Rows = list[Path] | None


@user_errors
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints, .gguf files, ONNX folders, folders of an export; pkg: and hf: too."
        ),
    ],
    out: Out,
    against: Annotated[
        str | None, typer.Option(help="The original: differences, stability, KL to it.")
    ] = None,
    choice: Annotated[
        Rows, typer.Option(help="Multiple choice: .jsonl of question, choices, answer.")
    ] = None,
    text: Annotated[Rows, typer.Option(help="Text for perplexity: .jsonl or .txt.")] = None,
    generate: Annotated[
        Rows, typer.Option(help="Short answers: .jsonl of question, answer_text or text, target.")
    ] = None,
    sets: Annotated[Path | None, typer.Option(help="A YAML file that lists sets.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows (or windows) a set, drawn with the seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which rows and windows are drawn.")] = 0,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens a window of text.")] = 512,
    context: Annotated[int, typer.Option(min=8, help="Tokens a model may see at once.")] = 2048,
    runtime: Annotated[
        str, typer.Option(help="Another runtime than the format's own, e.g. onnxruntime-genai.")
    ] = "",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with tokenizer.json, where a model has none.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of checkpoints: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of checkpoints: float32, bfloat16.")] = "float32",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of checkpoints: tokens run at once.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score models and artifacts on the same rows: accuracy, perplexity, short answers."""
    from shortstack import eval_commands, eval_report, terminal
    from shortstack.devices.host import usable_cores
    from shortstack.evaluate.sets import open_sets, set_of
    from shortstack.evaluate.targets import Loading

    wanted = [
        *(set_of("choice", path, limit=limit) for path in choice or ()),
        *(set_of("text", path, limit=limit, window_tokens=window_tokens) for path in text or ()),
        *(set_of("generation", path, limit=limit) for path in generate or ()),
        *(open_sets(sets, limit) if sets else ()),
    ]
    loading = Loading(context, threads or usable_cores(), device, dtype, batch_tokens)
    result = eval_commands.evaluate(
        models,
        against,
        wanted,
        loading,
        out,
        terminal.display(quiet or as_json),
        seed=seed,
        runtime=runtime,
        tokenizer=tokenizer,
    )
    answer(result, as_json, lambda: eval_report.show(result, quiet))
