"""The whole tool on one page: a recipe in, a report out; every step resumable."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from shortstack import early_exit_steps, exit_steps, forecast, mend, quantizing, reporting, steps
from shortstack.checkpoint import Checkpoint
from shortstack.devices.report import write_report
from shortstack.progress import Display
from shortstack.prune.plan import PrunePlan
from shortstack.recipe import Recipe
from shortstack.run_folder import RunFolder
from shortstack.text import Corpus


def run(recipe: Recipe, out: Path, display: Display, command: str = "") -> dict[str, Any]:
    """Plan, cut, repair, heal, train exits, quantize, export, verify, measure, report; fit an early
    exit and evaluate it.

    Returns the figures and the report's path.

    Finished steps with unchanged inputs are skipped, so a killed run goes on where it was.
    Artifacts that fail their check are removed and listed under `failures`; the others go on.
    Raises ShortstackError for what the user can mend.
    """
    forecast.refuse(recipe, out)
    corpus = steps.open_text(recipe.text)
    with RunFolder.claim(out, {"recipe": recipe.model_dump(mode="json")}, display) as folder:
        original = steps.open_original(folder, recipe.model)
        forecast.check_opened(recipe, original)
        steps.check_text(recipe, original, corpus)
        mend.check_text(recipe, original, corpus)
        quantizing.check_text(recipe, original, corpus)
        exit_steps.check_text(recipe, original, corpus)
        left = early_exit_steps.evaluated(folder, recipe, original)
        plan, models = _cut(folder, recipe, original, corpus)
        exits = exit_steps.trained(folder, recipe, original, corpus)
        models |= exit_steps.models(folder, recipe, original, exits)
        coded = {}
        if any(map(recipe.takes_codes, recipe.export)):
            coded = {
                label: quantizing.quantized(folder, recipe, label, checkpoint, corpus)
                for label, checkpoint in models.items()
            }
        exported = [
            steps.export(
                *(folder, recipe, label),
                coded[label] if recipe.takes_codes(wanted) else checkpoint,
                *(wanted, corpus),
            )
            for label, checkpoint in models.items()
            for wanted in recipe.export
        ]
        shutil.rmtree(out / steps.REFERENCES, ignore_errors=True)
        exported += exit_steps.depths(recipe, exits)
        measured = steps.bench(folder, recipe, exported, original, corpus) if exported else []
        data = reporting.collect(
            *(recipe, corpus, plan, models, exported, measured, command),
            exits=exit_steps.facts(exits, exported),
            early_exit=left,
        )
        failures = [e.failure for e in exported if e.failure]
        failures += [m.failure.message for m in measured if m.failure]
        return reporting.summary(data, write_report(data, out), failures)


def _cut(
    folder: RunFolder, recipe: Recipe, original: Checkpoint, corpus: Corpus
) -> tuple[PrunePlan | None, dict[str, Checkpoint]]:
    """The plan, and the models by label: the original and, where the recipe prunes, the cut one."""
    if recipe.prune is None:
        return None, {"original": original}
    plan = steps.plan(folder, recipe.prune, original, corpus)
    cut = steps.cut(folder, original, plan)
    pruned = mend.mended(folder, recipe, original, cut, plan, corpus)
    return plan, {"original": original, "pruned": pruned}
