"""`shortstack eval`: how good models and artifacts are, on your rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import JsonOption, Out, QuietOption, answer, user_errors

Models = Annotated[
    list[str],
    typer.Argument(
        help="Checkpoints, .gguf files, ONNX folders, folders of an export; pkg: and hf: too."
    ),
]
Against = Annotated[
    str | None, typer.Option(help="The original: differences, stability, KL to it.")
]
Choice = Annotated[
    list[Path] | None, typer.Option(help="Multiple choice: .jsonl of question, choices, answer.")
]
Texts = Annotated[list[Path] | None, typer.Option(help="Text for perplexity: .jsonl or .txt.")]
Generate = Annotated[
    list[Path] | None,
    typer.Option(help="Short answers: .jsonl of question, answer_text or text, target."),
]
Sets = Annotated[Path | None, typer.Option(help="A YAML file that lists sets.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Rows (or windows) a set, drawn with the seed.")
]
Seed = Annotated[int, typer.Option(help="Which rows and windows are drawn.")]
WindowTokens = Annotated[int, typer.Option(min=2, help="Tokens a window of text.")]
Context = Annotated[int, typer.Option(min=8, help="Tokens a model may see at once.")]
Runtime = Annotated[
    str, typer.Option(help="Another runtime than the format's own, e.g. onnxruntime-genai.")
]
Tokenizer = Annotated[
    Path | None, typer.Option(help="A folder with tokenizer.json, where a model has none.")
]
Device = Annotated[str, typer.Option(help="Of checkpoints: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Of checkpoints: float32, bfloat16, float16.")]
BatchTokens = Annotated[int | None, typer.Option(min=1, help="Of checkpoints: tokens run at once.")]


@user_errors
def evaluate(
    models: Models,
    out: Out,
    against: Against = None,
    choice: Choice = None,
    text: Texts = None,
    generate: Generate = None,
    sets: Sets = None,
    limit: Limit = None,
    seed: Seed = 0,
    window_tokens: WindowTokens = 512,
    context: Context = 2048,
    runtime: Runtime = "",
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_tokens: BatchTokens = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    early_exit: Annotated[
        Path | None, typer.Option(help="An early exit, from exits fit: layers and time saved.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score models and artifacts on the same rows: accuracy, perplexity, short answers."""
    from shortstack import eval_report, terminal
    from shortstack.commands import evaluate as eval_commands
    from shortstack.devices.host import usable_cores
    from shortstack.evaluate.sets import listed
    from shortstack.evaluate.targets import Loading

    files = {"choice": choice, "text": text, "generation": generate}
    wanted = listed(files, sets, limit, window_tokens)
    loading = Loading(context, threads or usable_cores(), device, dtype, batch_tokens)
    if early_exit is not None:
        from shortstack.cli.early_exit import evaluate_early_exit

        asked = [spec.path for spec in wanted if spec.kind == "choice"]
        evaluate_early_exit(
            models,
            asked,
            early_exit,
            loading,
            out,
            limit=limit,
            seed=seed,
            quiet=quiet,
            as_json=as_json,
        )
        return
    show = terminal.display(quiet or as_json)
    result = eval_commands.evaluate(
        models, against, wanted, loading, out, show, seed=seed, runtime=runtime, tokenizer=tokenizer
    )
    answer(result, as_json, lambda: eval_report.show(result, quiet))
