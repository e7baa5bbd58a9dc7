"""`shortstack bench`: models in every runtime that opens them, measured in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from shortstack.cli.shared import (
    DryRun,
    JsonOption,
    Out,
    QuietOption,
    Text,
    answer,
    user_errors,
)

LEAST_PROMPT, MOST_PROMPT = 1, 131_072
Models = Annotated[
    list[str],
    typer.Argument(
        help="Folders of an export, .gguf files, ONNX or Hugging Face folders; pkg: too."
    ),
]
Runtime = Annotated[
    list[str] | None,
    typer.Option(help="Only this one; repeats. Default: every runtime that opens the model."),
]
PromptTokens = Annotated[
    list[int] | None,
    typer.Option(min=LEAST_PROMPT, max=MOST_PROMPT, help="Length of the prompt; repeats. [128]"),
]
Depth = Annotated[
    str,
    typer.Option(
        help="Tokens in the cache before the prompt, untimed. Of a folder with exits: the depths "
        "to measure, e.g. 10,15,30."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences side by side.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, ...; doctor lists what is here.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="Of a runtime, NAME=VALUE: kv_type=q8_0, flash_attention=on, gpu_layers=20 "
        "(llama.cpp), dtype=bfloat16 (pytorch).",
    ),
]
Cold = Annotated[
    bool, typer.Option("--cold", help="Drop the files from memory before every second load.")
]
Energy = Annotated[
    bool, typer.Option("--energy", help="Read energy counters for half a minute a case.")
]
Ceilings = Annotated[
    bool, typer.Option(help="Measure what memory and arithmetic can do: seconds, first of all.")
]
Cooldown = Annotated[float, typer.Option(min=0, help="Seconds between trials.")]
Budget = Annotated[
    float | None, typer.Option(min=0, help="Seconds after which no further round starts.")
]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds after which a trial is killed.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: the physical cores we may use.")]


@user_errors
def bench(
    models: Models,
    out: Out,
    runtime: Runtime = None,
    device: Device = "cpu",
    text: Text = "spdx",
    prompt_tokens: PromptTokens = None,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Timed decode steps.")] = 64,
    depth: Depth = "0",
    batch: Batch = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed trials of each case.")] = 6,
    memory_repeats: Annotated[int, typer.Option(min=0, help="Trials watched for memory.")] = 2,
    threads: Threads = None,
    option: Options = None,
    seed: Annotated[int, typer.Option(help="Of the order of trials.")] = 0,
    cooldown: Cooldown = 0.0,
    time_budget: Budget = None,
    timeout: Timeout = 900.0,
    cold: Cold = False,
    energy: Energy = False,
    ceilings: Ceilings = True,
    dry_run: DryRun = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure models in fresh processes, in turn; keep every sample. A killed campaign goes on."""
    from shortstack import terminal
    from shortstack.bench.plan import BenchChoice, at_depths
    from shortstack.commands import bench as bench_commands
    from shortstack.commands.stages import split_option

    models, depth_tokens = at_depths(models, depth)
    choice = BenchChoice(
        runtimes=tuple(runtime or ()),
        prompt_tokens=tuple(prompt_tokens or (128,)),
        decode_tokens=decode_tokens,
        depth_tokens=depth_tokens,
        batch=batch,
        repeats=repeats,
        memory_repeats=memory_repeats,
        threads=threads,
        seed=seed,
        cooldown_s=cooldown,
        time_budget_s=time_budget,
        timeout_s=timeout,
        cold=cold,
        energy=energy,
        ceilings=ceilings,
        device=device,
        options=dict(split_option(item) for item in option or ()),
        text=text,
    )
    show = terminal.display(quiet or as_json)
    result = bench_commands.bench(models, choice, out, show, dry_run=dry_run)
    answer(result, as_json, lambda: (_show_plan if dry_run else _show)(result, quiet))
    if result.get("failures"):
        raise typer.Exit(1)


def _show(data: Mapping[str, Any], quiet: bool) -> None:
    """Medians of every case, then what makes them doubtful."""
    from shortstack.terminal import megabytes, print_facts, print_table

    if not quiet:
        names = ("load_warm_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")
        rows = [
            (_name(m), str(m["prompt_tokens"]), *(_digits(m[name]) for name in names))
            + (megabytes(m["peak_rss_bytes"]),)
            for m in data["measurements"]
        ]
        columns = (
            "model",
            "prompt",
            "load s",
            "TTFT s",
            "prefill tok/s",
            "decode tok/s",
            "peak RSS",
        )
        print_table("Medians, tokens a second", columns, rows)
        for m in data["measurements"]:
            case = f"{_name(m)}, {m['prompt_tokens']} tokens"
            print_facts({case: "; ".join(m["flags"]) or None}, quiet)
    print_facts({"failures": data["failures"] or "none", "record": data["record"]}, quiet=False)


def _show_plan(data: Mapping[str, Any], quiet: bool) -> None:
    from shortstack.terminal import megabytes, print_facts, print_table

    names = ("prompt_tokens", "context_tokens")
    rows = [
        (_name(c), *(str(c[name]) for name in names), megabytes(c["weight_bytes"]))
        for c in data["cases"]
    ]
    print_table("Would be measured", ("model", "prompt", "context", "weights"), rows)
    facts = {k: v for k, v in data.items() if k != "cases" and v != []}
    print_facts(facts, quiet=False)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['label']} {row['export']} in {row['runtime']}"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
