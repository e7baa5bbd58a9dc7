"""The steps of a run that train exits of the original and make a model of each."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack import mend, prune
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, require
from shortstack.exits.folder import TENSORS, WITH_LAYER, ExitFolder, check_exits, read_exits
from shortstack.intake import Preview
from shortstack.progress import OnProgress
from shortstack.prune.plan import PrunePlan
from shortstack.recipe import ExitsRecipe, Recipe
from shortstack.run_folder import RunFolder
from shortstack.steps import Exported
from shortstack.text import Corpus, open_corpus

FOLDER = "exits"


def label_of(exit: int) -> str:
    """What folders and the report call the model of an exit."""
    return f"exit-{exit}"


def check(recipe: Recipe, preview: Preview | None) -> None:
    """Refuse what these steps could not do; `preview`: the original, where it lies here. Raises
    ShortstackError."""
    if recipe.exits is None:
        return
    require(("torch", "transformers", "accelerate"), "heal", "training exits")
    mend.training_settings(recipe.exits, recipe.seed)
    missing = sorted(set(recipe.exits.chosen) - set(recipe.exits.at))
    if missing:
        raise ShortstackError(
            f"exits.export names an exit behind {missing[0]} layers, exits.at does not. Add it "
            "there, or leave it out."
        )
    if len(set(recipe.exits.chosen)) < len(recipe.exits.chosen):
        raise ShortstackError("exits.export names an exit twice. Name each once.")
    if preview is not None:
        check_opened(recipe, preview.checkpoint)


def check_opened(recipe: Recipe, original: Checkpoint) -> None:
    """Refuse exits that this model cannot have. Raises ShortstackError."""
    if recipe.exits is None:
        return
    from shortstack.prune.exits.cut import exit_cut
    from shortstack.prune.exits.train import check_training

    choice = _choice(recipe.exits)
    check_training(original, choice, mend.training_settings(recipe.exits, recipe.seed))
    planned = ExitFolder(
        original.path, original.path, "", original.n_layers, choice.exits, choice.init, "", {}
    )
    for exit in choice.exits:
        exit_cut(original, planned, exit)


def check_text(recipe: Recipe, original: Checkpoint, corpus: Corpus) -> None:
    """Cut every window that training will want: too little text is no news for the end."""
    if recipe.exits is not None:
        mend.training_windows(recipe.exits, recipe.seed, original, corpus)


def trained(
    folder: RunFolder, recipe: Recipe, original: Checkpoint, corpus: Corpus
) -> ExitFolder | None:
    """The exits of the original, in `exits`; None where the recipe has none. A killed run goes on
    from its last state."""
    wanted = recipe.exits
    if wanted is None:
        return None
    from shortstack.prune.exits.train import train_exits

    inputs = {
        "model": original.sha256,
        "text": corpus.sha256,
        "exits": wanted.model_dump(exclude={"export", "bench"}),
        "seed": recipe.seed,
        **({"general": open_corpus(wanted.general).sha256} if wanted.general else {}),
    }
    state = folder.path / f".{FOLDER}.training"

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        learnt, selection = mend.training_windows(wanted, recipe.seed, original, corpus)
        made = train_exits(
            *(original, _choice(wanted), learnt, selection, partial),
            mend.training_settings(wanted, recipe.seed),
            lies_at=folder.path / FOLDER,
            progress=progress,
            note=folder.display.note,
            state=state,
        )
        return {"exits": {"at": list(made.exits), "sha256": made.sha256}}

    where, _ = folder.build(FOLDER, "Train the exits", inputs, make)
    shutil.rmtree(state, ignore_errors=True)
    return read_exits(where, original.path)


def models(
    folder: RunFolder, recipe: Recipe, original: Checkpoint, exits: ExitFolder | None
) -> dict[str, Checkpoint]:
    """A model of k + 1 layers for each exit that is exported, in `exit-K/checkpoint`."""
    if exits is None or recipe.exits is None:
        return {}
    return {label_of(k): _model(folder, original, exits, k) for k in recipe.exits.chosen}


def _model(folder: RunFolder, original: Checkpoint, exits: ExitFolder, exit: int) -> Checkpoint:
    from shortstack.prune.exits.cut import write_exit

    inputs = {"base": exits.base_sha256, "exits": exits.sha256, "exit": exit}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        made = write_exit(original, exits, exit, partial, progress=progress)
        return {"exit": {"exit": exit, "n_layers": made.n_layers, "sha256": made.sha256}}

    where, _ = folder.build(f"{label_of(exit)}/checkpoint", f"Write exit {exit}", inputs, make)
    return Checkpoint.open(where)


def depths(recipe: Recipe, exits: ExitFolder | None) -> list[Exported]:
    """Every depth as PyTorch runs it, from one set of weights, of whose size all are: what is
    measured beside exports."""
    if exits is None or recipe.exits is None or not recipe.exits.bench:
        return []
    from shortstack.bench.models import benchable

    found = []
    whole = exits.open_base().n_bytes + (exits.path / TENSORS).stat().st_size
    note = "a depth of one set of weights, whose size is that of the model and all of its exits"
    for depth in exits.depths:
        artifact = dataclasses.replace(
            benchable(str(exits.path.with_name(f"{exits.path.name}@{depth}"))),
            size_bytes=whole,
            notes=(note,),
        )
        label = "original" if depth == exits.n_layers else label_of(depth)
        found.append(Exported(label, artifact.spec.slug, artifact, None, {}))
    return found


def facts(exits: ExitFolder | None, exported: Sequence[Exported]) -> dict[str, Any] | None:
    """For the report: of each depth its figures on selection text, and perplexity on the test part
    where its model was exported."""
    if exits is None:
        return None
    unseen = {
        e.label: e.verification["reference_perplexity"]
        for e in exported
        if e.verification is not None and not e.quantized
    }
    after: Mapping[str, Any] = exits.facts["losses"]
    rows = [
        {
            "depth": exit,
            "layers": exits.layers_at(exit),
            **after[str(exit)]["after"],
            "unseen_perplexity": unseen.get(label_of(exit)),
        }
        for exit in exits.exits
    ]
    whole = {
        "depth": exits.n_layers,
        "layers": exits.n_layers,
        **{"kl": 0.0, "perplexity": exits.facts["perplexity"], "same_token": 1.0},
        "unseen_perplexity": unseen.get("original"),
    }
    told = {name: exits.facts[name] for name in ("tokens", "steps", "best_step")}
    return {"init": exits.init, **told, "depths": [*rows, whole]}


def preview(original: Checkpoint, choice: ExitsRecipe, exit: int) -> Checkpoint:
    """The model of an exit as headers, before it exists: only for predictions."""
    return prune.preview(original, _stand_in(original, choice, exit))


def predict(original: Checkpoint, choice: ExitsRecipe) -> list[tuple[str, dict[str, int]]]:
    """(folder, what it takes): training holds the model in float32, of what learns gradients,
    moments and the best state as well, and logits of some hundred positions; then the models."""
    exits = check_exits(choice.at, original.n_layers)
    last = original.n_layers - 1
    own = original.layer_bytes(last) if choice.init in WITH_LAYER else 0
    width = original.n_bytes / original.n_params
    learnt = round(len(exits) * own / width)
    training = {
        "output_bytes": len(exits) * own + 2**12,
        "peak_ram_bytes": 4 * original.n_params + 5 * 4 * learnt + 2**31,
        "disk_bytes": len(exits) * own + 4 * 4 * learnt + 2**12,
    }
    rows = [(FOLDER, training)]
    for exit in choice.chosen:
        made = prune.predict_prune(original, _stand_in(original, choice, exit))
        rows.append((f"{label_of(exit)}/checkpoint", made))
    return rows


def _stand_in(original: Checkpoint, choice: ExitsRecipe, exit: int) -> PrunePlan:
    """A cut of an exit's size: the last layer is of the shape of the exit's own."""
    last = original.n_layers - 1
    end = last if choice.init in WITH_LAYER else original.n_layers
    return PrunePlan(original.n_layers, tuple(range(exit, end)), "exit")


def _choice(wanted: ExitsRecipe) -> Any:
    from shortstack.prune.exits.train import ExitChoice

    return ExitChoice(tuple(sorted(wanted.at)), wanted.init)
