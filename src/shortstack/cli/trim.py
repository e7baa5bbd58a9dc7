"""The command `shortstack trim`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortstack.cli.shared import (
    JsonOption,
    Model,
    Out,
    QuietOption,
    answer,
    naming_options,
    user_errors,
)


@user_errors
def trim(
    model: Model,
    tune: Annotated[Path, typer.Option(help="Questions to tune on: .jsonl.")],
    out: Out,
    scan: Annotated[
        Path | None, typer.Option(help="Questions that choose what goes. Default: a fifth of tune.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Questions scored once, at the end.")] = None,
    off_domain: Annotated[
        list[Path] | None, typer.Option(help="Other questions, scored at the end, too.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of sub-blocks to keep.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Points of scan accuracy that may be lost, and ...")
    ] = None,
    full_accuracy: Annotated[
        float | None, typer.Option(help="... the full fine-tune's accuracy (0 to 1).")
    ] = None,
    max_mb: Annotated[float | None, typer.Option(help="Megabytes of weights as float32.")] = None,
    max_latency: Annotated[
        float | None, typer.Option(help="Time of a forward pass against the dense model's.")
    ] = None,
    snapshot: Annotated[
        list[float] | None, typer.Option(help="Share at which to keep a model on the way.")
    ] = None,
    mode: Annotated[str, typer.Option(help="progressive, one-shot or full.")] = "progressive",
    unit: Annotated[str, typer.Option(help="sub-block or block.")] = "sub-block",
    score: Annotated[str, typer.Option(help="both, scan, norm or likelihood.")] = "both",
    objective: Annotated[
        str, typer.Option(help="answer: the right one likely; choices: likelier than the others.")
    ] = "answer",
    ratio: Annotated[float, typer.Option(help="Share of sub-blocks that is trained.")] = 0.25,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    epochs_per_drop: Annotated[int, typer.Option(min=1)] = 1,
    last_epochs: Annotated[int, typer.Option(min=0, help="More rounds after the last drop.")] = 0,
    first_scan: Annotated[
        str, typer.Option(help="What trains is chosen on the tuned or the untuned model.")
    ] = "tuned",
    rows_per_epoch: Annotated[int, typer.Option(min=1)] = 1500,
    batch_rows: Annotated[int, typer.Option(min=1)] = 16,
    drop_per_step: Annotated[int, typer.Option(min=1)] = 1,
    max_prompt_tokens: Annotated[int, typer.Option(min=8)] = 512,
    protect_first: Annotated[int, typer.Option(min=0, help="Layers that stay.")] = 0,
    protect_last: Annotated[int, typer.Option(min=0, help="Layers that stay.")] = 0,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tune on a domain's questions and take depth out on the way (TrimLLM)."""
    from shortstack import terminal
    from shortstack.commands import trim as trim_commands

    settings = {
        **{"mode": mode, "unit": unit, "score": score, "ratio": ratio, "rate": rate},
        **{"epochs": epochs_per_drop, "rows_per_epoch": rows_per_epoch, "batch_rows": batch_rows},
        **{"drop_per_step": drop_per_step, "max_prompt_tokens": max_prompt_tokens, "seed": seed},
        **{"protect_first": protect_first, "protect_last": protect_last},
        **{"last_epochs": last_epochs, "first_scan": first_scan, "objective": objective},
        "snapshots": tuple(snapshot or ()),
    }
    target = {
        "keep": keep,
        "loss_points": tolerance,
        "full_accuracy": full_accuracy,
        "max_bytes": None if max_mb is None else int(max_mb * 1e6),
        "max_latency_ratio": max_latency,
    }
    with naming_options(epochs="epochs_per_drop", snapshots="snapshot"):
        result = trim_commands.trim(
            model,
            {"tune": tune, "scan": scan, "test": test},
            off_domain or [],
            settings,
            target,
            out,
            device=device,
            display=terminal.display(quiet or as_json),
        )
    answer(result, as_json, lambda: terminal.print_facts(result, quiet))
