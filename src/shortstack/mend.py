"""The steps of a run that bring a cut model back: repair without training, then healing."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, one_line, require, unknown
from shortstack.progress import OnProgress
from shortstack.prune.plan import PrunePlan
from shortstack.prune.repair import CHOICES
from shortstack.recipe import HealRecipe, Recipe, RepairRecipe
from shortstack.recipe_sections import TrainingRecipe
from shortstack.run_folder import RunFolder
from shortstack.text import Corpus, open_corpus
from shortstack.tokens import Encoder

SELECTION_WINDOWS = 32
"""On which the best state of healing is chosen."""


def check(recipe: Recipe) -> None:
    """Refuse what these steps could not do. Raises ShortstackError."""
    if recipe.repair is not None and recipe.repair.method not in CHOICES:
        raise unknown("repair", recipe.repair.method, CHOICES)
    if recipe.heal is not None:
        require(("torch", "transformers", "accelerate"), "heal", "healing")
        training_settings(recipe.heal, recipe.seed)


def check_text(recipe: Recipe, original: Checkpoint, corpus: Corpus) -> None:
    """Cut every window that these steps will want: too little text is no news for the end."""
    if recipe.repair is not None:
        _repair_windows(recipe.repair, original, corpus)
    if recipe.heal is not None:
        training_windows(recipe.heal, recipe.seed, original, corpus)


def mended(
    folder: RunFolder,
    recipe: Recipe,
    original: Checkpoint,
    cut: Checkpoint,
    made: PrunePlan,
    corpus: Corpus,
) -> Checkpoint:
    """The cut checkpoint after the repair and the healing that the recipe asks for."""
    if recipe.repair is not None:
        cut = _repair(folder, recipe.repair, original, cut, made, corpus)
    if recipe.heal is not None:
        cut = _heal(folder, recipe, recipe.heal, original, cut, corpus)
    return cut


def _repair(
    folder: RunFolder,
    choice: RepairRecipe,
    original: Checkpoint,
    cut: Checkpoint,
    made: PrunePlan,
    corpus: Corpus,
) -> Checkpoint:
    from shortstack.prune.repair import repair

    inputs = {"model": cut.sha256, "text": corpus.sha256, "repair": choice.model_dump()}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        windows = _repair_windows(choice, cut, corpus)
        _, facts = repair(
            original, cut, made, *windows, partial, method=choice.method, progress=progress
        )
        return {"repair": facts}

    where, _ = folder.build("pruned/repaired", "Repair the cut", inputs, make)
    return Checkpoint.open(where)


def _heal(
    folder: RunFolder,
    recipe: Recipe,
    choice: HealRecipe,
    original: Checkpoint,
    cut: Checkpoint,
    corpus: Corpus,
) -> Checkpoint:
    from shortstack.prune.heal.train import heal

    inputs = {
        "model": cut.sha256,
        "teacher": original.sha256,
        "text": corpus.sha256,
        "heal": choice.model_dump(),
        "seed": recipe.seed,
        **({"general": open_corpus(choice.general).sha256} if choice.general else {}),
    }
    state = folder.path / "pruned" / ".healing"
    """A killed run goes on from what it saved here."""

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        train, selection = training_windows(choice, recipe.seed, cut, corpus)
        settings = training_settings(choice, recipe.seed)
        _, facts = heal(
            *(cut, original, train, selection, partial, settings),
            progress=progress,
            note=folder.display.note,
            state=state,
        )
        return {"heal": facts}

    where, manifest = folder.build("pruned/healed", "Heal the cut", inputs, make)
    shutil.rmtree(state, ignore_errors=True)
    facts = manifest["heal"]
    folder.display.note(
        f"healed: perplexity {facts['perplexity_before']:.2f} to {facts['perplexity_after']:.2f} "
        f"on selection text, {facts['tokens_seen']:,} tokens"
    )
    return Checkpoint.open(where)


def training_settings(choice: TrainingRecipe, seed: int) -> Any:
    """What a section of a recipe says, as `HealSettings`. Raises ShortstackError for an option that
    these do not have, that this training does not read, and that is a key of the section."""
    from shortstack.prune.heal.settings import HealSettings

    known = {field.name for field in dataclasses.fields(HealSettings)} - choice.unread
    named = choice.model_dump(include=known)
    twice = sorted(set(choice.options) & named.keys())
    if twice:
        raise ShortstackError(
            f"{twice[0]} is among the options of training and has a key of its own. Write it "
            f"beside options, not in them: {twice[0]}: {choice.options[twice[0]]}"
        )
    wrong = sorted(set(choice.options) - known)
    if wrong:
        raise unknown("option of training", wrong[0], known - named.keys())
    types = get_type_hints(HealSettings)
    for name, value in choice.options.items():
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:  # a text where a number belongs
            told = one_line(error.errors()[0]["msg"], 120)
            raise ShortstackError(
                f"{name} among the options of training is {value!r}: {told}. Mend the option."
            ) from None
    return HealSettings(**{"seed": seed, **named, **choice.options})


def _repair_windows(
    choice: RepairRecipe, checkpoint: Checkpoint, corpus: Corpus
) -> tuple[list[list[int]], list[list[int]]]:
    encoder, length = Encoder(checkpoint), choice.window_tokens
    return (
        encoder.windows(corpus.calibration, length, choice.windows),
        encoder.windows(corpus.selection, length, max(1, choice.windows // 4)),
    )


def training_windows(
    choice: TrainingRecipe, seed: int, checkpoint: Checkpoint, corpus: Corpus
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to train on, the user's and general text mixed, and those to choose the best on."""
    from shortstack.prune.heal.data import Documents, healing_windows

    own, general = Documents(corpus.calibration, corpus.selection, corpus.test), None
    if choice.general is not None:
        # the best state is the best on the user's text: general text is only learnt from
        general = Documents(open_corpus(choice.general).calibration, (), ())
    return healing_windows(
        *(own, general, Encoder(checkpoint), training_settings(choice, seed)),
        share=choice.share,
        selection_windows=SELECTION_WINDOWS,
    )
