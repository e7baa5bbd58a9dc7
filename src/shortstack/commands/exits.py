"""`shortstack exits`: train exits beside a model, write one as a model of its own."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from shortstack.commands.heal import HealText, beside, training_folder, windows_for
from shortstack.errors import require
from shortstack.exits.folder import ExitFolder, read_exits
from shortstack.exits.named import exit_key
from shortstack.families import context_tokens
from shortstack.manifest import check_apart, check_ours, finished, staged, step_key, write_manifest
from shortstack.progress import Display
from shortstack.prune.heal.settings import HealSettings


def train(
    model: str,
    exits: tuple[int, ...],
    text: HealText,
    out: Path,
    settings: HealSettings,
    *,
    init: str,
    compiled: bool = False,
    display: Display,
) -> dict[str, Any]:
    """Train exits of the folder `model`, which stays as it is; `out` becomes a folder of exits.

    A killed run goes on where it was when it is started again.
    """
    require(("torch", "transformers", "accelerate"), "heal", "training exits")
    from shortstack.prune.exits.train import ExitChoice, check_training, train_exits

    check_ours(out, "exits")
    base = training_folder(model)
    check_apart(out, [base.path])
    choice = ExitChoice(tuple(sorted(exits)), init, compiled)
    check_training(base, choice, settings)
    learnt, selection = windows_for(base, text, settings)
    inputs = {
        "model": base.sha256,
        "exits": [choice.exits, init],
        "text": [learnt, selection],
        "settings": dataclasses.asdict(settings),
    }
    key = step_key("exits", inputs)
    kept = finished(out, key)
    if kept is None:
        run = functools.partial(train_exits, base, choice, learnt, selection, settings=settings)
        with display.step("Train the exits") as progress, staged(out, "exits") as partial:
            made = run(
                partial,
                lies_at=out,
                progress=progress,
                note=display.note,
                state=beside(out, "training"),
            )
            kept = write_manifest(partial, "exits", key, {"exits": _summary(made)})
    return {"folder": str(out), **kept["exits"]}


def write(
    folder: str, exit: int, out: Path, *, model: str | None, display: Display
) -> dict[str, Any]:
    """Write an exit as an ordinary Hugging Face folder of k + 1 layers."""
    from shortstack.prune.exits.cut import write_exit

    exits = found(folder, model)
    exits.check_exit(exit)
    check_ours(out, "exit")
    check_apart(out, [exits.path, exits.base])
    key = exit_key(exits, exit)
    kept = finished(out, key)
    if kept is None:
        base = exits.open_base()
        with display.step(f"Write exit {exit}") as progress, staged(out, "exit") as partial:
            made = write_exit(base, exits, exit, partial, progress=progress)
            facts = {
                "exit": exit,
                "n_layers": made.n_layers,
                "n_params": made.n_params,
                "source_sha256": base.sha256,
                "sha256": made.sha256,
            }
            kept = write_manifest(partial, "exit", key, {"exit": facts})
    return {"checkpoint": str(out), **kept["exit"]}


def choose(
    folder: str,
    max_latency_ms: float,
    *,
    prompt_tokens: int,
    new_tokens: int,
    model: str | None,
    dtype: str,
    device: str,
    threads: int,
) -> dict[str, Any]:
    """Measure what depth costs here; the deepest one within a budget, and what each would take."""
    require(("torch", "transformers"), "prune", "running exits")
    from shortstack.devices.host import check_threads
    from shortstack.runtimes import capabilities
    from shortstack.runtimes.pytorch_exits import STEPS, ExitsSession, check_request

    check_threads(threads)
    capabilities.check("pytorch", device, 1, {"dtype": dtype})
    exits = found(folder, model)
    context = context_tokens(exits.open_base().config, windowed=True)
    check_request(prompt_tokens, new_tokens, context, "the model's")
    with ExitsSession(
        exits.path,
        model=exits.base,
        threads=threads,
        context_tokens=max(2 * prompt_tokens, prompt_tokens + new_tokens) + STEPS,
        device=device,
        dtype=dtype,
    ) as session:
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        depth = session.choose(max_latency_ms, **sizes)
        cost = session.cost(prompt_tokens)
    return {
        "depth": depth,
        "layers": exits.layers_at(depth),
        "max_latency_ms": max_latency_ms,
        **sizes,
        "predicted_ms": {
            str(d): round(1e3 * cost.seconds(exits.layers_at(d), new_tokens), 3)
            for d in exits.depths
        },
        "prefill_per_layer_ms": 1e3 * cost.prefill.per_layer_s,
        "step_per_layer_ms": 1e3 * cost.step.per_layer_s,
    }


def found(folder: str, model: str | None = None) -> ExitFolder:
    """The exits in a folder: one of exits, or the base's own that holds them."""
    return read_exits(Path(folder), None if model is None else Path(model))


def _summary(made: ExitFolder) -> dict[str, Any]:
    """What a user wants to see of a training."""
    wanted = ("perplexity", "tokens", "steps", "best_step", "stopped", "tokens_per_s", "wall_s")
    facts = {name: made.facts[name] for name in wanted}
    after = {exit: row["after"] for exit, row in made.facts["losses"].items()}
    return {
        "at": list(made.exits),
        "init": made.init,
        "base_sha256": made.base_sha256,
        "kl": {exit: row["kl"] for exit, row in after.items()},
        "perplexities": {exit: row["perplexity"] for exit, row in after.items()},
        "same_token": {exit: row["same_token"] for exit, row in after.items()},
        **facts,
        "peak_bytes": made.facts["peak_bytes"],
    }
