"""The whole tool on one page: a recipe in, a report out; every step resumable."""

from __future__ import annotations

from pathlib import Path

from shortstack import steps
from shortstack.progress import Display
from shortstack.recipe import Recipe
from shortstack.run_folder import RunFolder

LABELS = ("original", "pruned")


def run(recipe: Recipe, out: Path, display: Display) -> Path:
    """Plan, cut, export, verify, measure, report. Returns the report's path.

    Finished steps with unchanged inputs are skipped, so a killed run goes on where it was.
    Raises ShortstackError for what the user can mend and VerificationError for an artifact that
    differs from its checkpoint.
    """
    steps.check_recipe(recipe)
    with RunFolder.claim(out, recipe, display) as folder:
        corpus = steps.open_text(recipe)
        original = steps.open_original(folder, recipe)
        steps.check_space(folder, recipe, original)
        plan = steps.plan(folder, recipe, original, corpus)
        pruned = steps.cut(folder, original, plan)
        checkpoints = dict(zip(LABELS, (original, pruned), strict=True))
        artifacts = {
            (label, export.to): steps.export(folder, recipe, label, checkpoint, export, corpus)
            for export in recipe.export
            for label, checkpoint in checkpoints.items()
        }
        for export in recipe.export:
            pair = {label: artifacts[label, export.to] for label in LABELS}
            steps.bench(folder, recipe, export, pair, original, corpus)
        return steps.report(folder, recipe)
