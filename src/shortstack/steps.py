"""The steps of a run. Each makes one folder from values and files, and is skipped when done."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack import certify, prune
from shortstack import export as exporting
from shortstack.artifact import Artifact
from shortstack.certify import Bounds
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.intake import describe_model, open_model
from shortstack.progress import OnProgress
from shortstack.prune.plan import PrunePlan, parse_drop
from shortstack.recipe import ExportRecipe, PruneRecipe, Recipe, TextRecipe
from shortstack.run_folder import RunFolder
from shortstack.text import Corpus, open_corpus
from shortstack.tokens import Encoder


def check_recipe(recipe: Recipe) -> None:
    """Refuse what no step could do, before anything is written or computed."""
    prune.planner(recipe.prune.method)
    wanted_layers(recipe.prune)
    describe_model(recipe.model)
    for export in recipe.export:
        exporting.check(export.spec)


def open_text(recipe: Recipe) -> Corpus:
    text = recipe.text
    return open_corpus(text.model_dump() if isinstance(text, TextRecipe) else text)


def wanted_layers(choice: PruneRecipe) -> int | tuple[int, ...]:
    """A count for methods that choose, layer numbers for `explicit`."""
    drop = choice.drop
    if choice.method == "explicit":
        return tuple(sorted(drop)) if isinstance(drop, list) else parse_drop(str(drop))
    if isinstance(drop, list) or not str(drop).isdecimal():
        raise ShortstackError(
            f"method {choice.method!r} chooses layers itself: drop must be a count, got {drop!r}. "
            "Name a count, or use the method explicit."
        )
    return int(drop)


def open_original(folder: RunFolder, recipe: Recipe) -> Checkpoint:
    with folder.display.step("Open the model") as progress:
        return open_model(recipe.model, folder.path / "model", progress=progress)


def plan(folder: RunFolder, recipe: Recipe, original: Checkpoint, corpus: Corpus) -> PrunePlan:
    """Choose the layers on calibration text."""
    inputs = {"model": original.sha256, "text": corpus.sha256, "prune": recipe.prune.model_dump()}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        made = choose_layers(original, recipe.prune, corpus, progress)
        (partial / "plan.json").write_text(made.to_json(), encoding="utf-8")
        return {"dropped": list(made.drop), "method": made.method}

    where, _ = folder.build("plan", "Choose layers", inputs, make)
    return PrunePlan.from_json((where / "plan.json").read_text(encoding="utf-8"))


def choose_layers(
    checkpoint: Checkpoint, choice: PruneRecipe, corpus: Corpus, progress: OnProgress
) -> PrunePlan:
    windows = Encoder(checkpoint).windows(
        corpus.calibration, choice.window_tokens, choice.windows
    )
    return prune.planner(choice.method)(
        checkpoint,
        drop=wanted_layers(choice),
        windows=windows,
        progress=progress,
        **choice.options,
    )


def cut(folder: RunFolder, original: Checkpoint, made: PrunePlan) -> Checkpoint:
    """Write the pruned checkpoint."""
    inputs = {"model": original.sha256, "drop": list(made.drop)}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        pruned = prune.apply_plan(original, made, partial, progress=progress)
        return {
            "source_sha256": original.sha256,
            "sha256": pruned.sha256,
            "dropped": list(made.drop),
            "n_layers": pruned.n_layers,
            "n_params": pruned.n_params,
        }

    where, _ = folder.build("pruned/checkpoint", "Cut the layers", inputs, make)
    return Checkpoint.open(where)
