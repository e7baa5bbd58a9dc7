"""The steps of a run that fit when prompts may leave the original, and hold that against rows
that nothing was fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint, hash_file
from shortstack.devices.host import describe, usable_cores
from shortstack.errors import require
from shortstack.evaluate.targets import Loading
from shortstack.manifest import read_manifest
from shortstack.progress import Display
from shortstack.questions import open_questions, refuse_leaks
from shortstack.recipe import EarlyExitRecipe, Recipe
from shortstack.run_folder import RunFolder

RULE, SCORES = "early-exit/rule", "early-exit/scores"
FILE = "early_exit.safetensors"
SETTINGS = (
    *("check", "classifier", "every", "first", "max_accuracy_loss", "max_changed"),
    "check_cost",
)


def check(recipe: Recipe) -> None:
    """Refuse what these steps could not do: files that are no questions or share some, settings
    that cannot be. Raises ShortstackError."""
    choice = recipe.early_exit
    if choice is None:
        return
    require(("torch", "transformers"), "prune", "fitting an early exit")
    require(("sklearn",), "exits", "fitting an early exit")
    from shortstack.prune.early_exit.fit import Settings

    Settings(**choice.model_dump(include=set(SETTINGS)))
    parts = {"tune": open_questions(Path(choice.tune))}
    if choice.validation is not None:
        parts["validation"] = open_questions(Path(choice.validation))
    tested = [row for file in choice.test for row in open_questions(Path(file))]
    refuse_leaks({**parts, "test": tuple(tested)})


def evaluated(
    folder: RunFolder, recipe: Recipe, original: Checkpoint
) -> list[dict[str, Any]] | None:
    """Fit the rule and the rules to beat, answer the test rows with all of them and the whole
    model; what is known of each set. None where the recipe has no such step."""
    choice = recipe.early_exit
    if choice is None:
        return None
    rule = _fitted(folder, recipe, choice, original) / FILE
    return _scored(folder, recipe, choice, original, rule)


def _fitted(
    folder: RunFolder, recipe: Recipe, choice: EarlyExitRecipe, original: Checkpoint
) -> Path:
    from shortstack.commands.early_exit import fit_exit

    files = [choice.tune, *([choice.validation] if choice.validation else [])]
    inputs = {
        "model": original.sha256,
        "rows": [hash_file(Path(file)) for file in files],
        "settings": choice.model_dump(exclude={"tune", "validation", "test"}),
        "seed": recipe.seed,
    }

    def make(partial: Path, display: Display) -> dict[str, Any]:
        validation = None if choice.validation is None else Path(choice.validation)
        settings = choice.model_dump(include=set(SETTINGS))
        told = fit_exit(
            *(str(original.path), Path(choice.tune), validation, settings),
            *(partial / FILE, _loading(recipe, choice)),
            answers=choice.answers,
            shots=choice.shots,
            rows=choice.rows,
            seed=recipe.seed,
            display=display,
        )
        return {"early_exit": {k: v for k, v in told.items() if k != "classifier"}}

    return folder.build_by_steps(RULE, "Fit the early exit", inputs, make)[0]


def _scored(
    folder: RunFolder, recipe: Recipe, choice: EarlyExitRecipe, original: Checkpoint, rule: Path
) -> list[dict[str, Any]]:
    from shortstack.commands.early_exit_eval import evaluate_exit

    files = [Path(file) for file in choice.test]
    fitted = read_manifest(rule.parent)
    assert fitted is not None
    loading = _loading(recipe, choice)
    inputs = {
        "model": original.sha256,
        "rules": {name: facts["sha256"] for name, facts in fitted["files"].items()},
        "rows": [[file.name, hash_file(file)] for file in files],
        "settings": [choice.rows, choice.context, choice.device, choice.dtype, loading.threads],
        "seed": recipe.seed,
        "cpu": describe()["cpu"],
    }

    def make(partial: Path, display: Display) -> dict[str, Any]:
        evaluate_exit(
            *(str(original.path), files, rule, loading, partial),
            limit=choice.rows,
            seed=recipe.seed,
            display=display,
        )
        return {}

    where, _ = folder.build_by_steps(SCORES, "Evaluate the early exit", inputs, make)
    data = json.loads((where / "early_exit.json").read_text(encoding="utf-8"))
    how = {"device": data["device"], "dtype": data["dtype"]}
    return [{k: v for k, v in row.items() if k != "answers"} | how for row in data["results"]]


def _loading(recipe: Recipe, choice: EarlyExitRecipe) -> Loading:
    threads = recipe.bench.threads or usable_cores()
    return Loading(choice.context, threads, choice.device, choice.dtype)
