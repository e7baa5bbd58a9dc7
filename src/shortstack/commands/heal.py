"""`shortstack heal`: train a cut model on text towards the model it was cut from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.commands.stages import opened
from shortstack.errors import ShortstackError, require
from shortstack.intake import model_paths, resolve
from shortstack.manifest import check_apart, check_ours, finished, staged, step_key, write_manifest
from shortstack.progress import Display
from shortstack.prune.heal.data import drawn, healing_windows, read_documents
from shortstack.prune.heal.settings import HealSettings
from shortstack.tokens import Encoder

BEGINNING_TOKENS = 8
"""Of a training window: what the teacher goes on from when it writes text itself."""

CHOICE_WINDOWS = 16
"""Training windows on which the run of LLM-Streamline is chosen."""


@dataclasses.dataclass(frozen=True)
class HealText:
    """Where the text comes from; `share` is that of general text among training windows.

    `self_generated_tokens`: how many tokens more the teacher shall write itself, each window
    beginning with the first few tokens of a training window.
    """

    own: tuple[str, ...]
    general: tuple[str, ...] = ()
    share: float = 0.5
    selection_windows: int = 32
    self_generated_tokens: int = 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks, of those that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def heal_model(
    student: str,
    teacher: str | None,
    text: HealText,
    out: Path,
    settings: HealSettings,
    *,
    cache: Path | None = None,
    display: Display,
) -> dict[str, Any]:
    """Heal the folder `student`; `out` becomes a Hugging Face folder like it. The teacher may be
    any model that intake opens.

    Under `accelerate launch` every process comes here; the first one writes and speaks.
    """
    require(("torch", "transformers", "accelerate"), "heal", "healing")
    check_ours(out, "heal")
    cut = training_folder(student)
    check_apart(out, [cut.path, *(model_paths(teacher) if teacher else ())])
    train, selection = windows_for(cut, text, settings)
    with _teacher(teacher, out, display) as original:
        inputs = {
            "student": cut.sha256,
            "teacher": original.sha256 if original else None,
            "text": [train, selection],
            "self_generated_tokens": text.self_generated_tokens,
            "settings": dataclasses.asdict(settings),
        }
        key = step_key("heal", inputs)
        kept = finished(out, key)
        if kept is None:
            train = [*train, *_self_generated(original, train, text, out, settings, key, display)]
            windows = (train, selection)
            kept = _healed(cut, original, windows, out, settings, cache, key, display)
            beside(out, "samples").unlink(missing_ok=True)
    return {"checkpoint": str(out), **kept["heal"]}


@contextlib.contextmanager
def _teacher(model: str | None, out: Path, display: Display) -> Iterator[Checkpoint | None]:
    """The teacher, which each of several processes opens for itself: what has to be made into a
    folder lies beside `out` meanwhile, under a name of that process."""
    if model is None:
        yield None
        return
    rank = os.environ.get("RANK")
    near = out if rank is None else out.with_name(f"{out.name}.{rank}")
    with opened(model, near, display) as checkpoint:
        yield checkpoint


def _healed(
    cut: Checkpoint,
    original: Checkpoint | None,
    windows: tuple[list[list[int]], list[list[int]]],
    out: Path,
    settings: HealSettings,
    cache: Path | None,
    key: str,
    display: Display,
) -> dict[str, Any]:
    """The manifest of the healed folder, or, in a process that does not write, its part of it."""
    from shortstack.prune.heal.train import heal

    run = functools.partial(
        heal, cut, original, *windows, settings=settings, state=beside(out, "healing"), cache=cache
    )
    if not is_first():
        return {"heal": run(out=beside(out, "partial"))[1]}  # where the first process writes
    with display.step("Heal") as progress, staged(out, "heal") as partial:
        healed, facts = run(out=partial, progress=progress, note=display.note)
        facts = {**facts, "source_sha256": cut.sha256, "sha256": healed.sha256}
        return write_manifest(partial, "heal", key, {"heal": facts})


def beside(out: Path, what: str) -> Path:
    target = out.resolve()
    return target.with_name(f".{target.name}.{what}")


def streamline_model(
    model: str,
    drop: int,
    text: HealText,
    out: Path,
    settings: HealSettings,
    *,
    objective: str,
    replacement: str,
    display: Display,
) -> dict[str, Any]:
    """Put one trained layer in the place of a run; `out` becomes a Hugging Face folder."""
    require(("torch", "transformers", "accelerate"), "heal", "LLM-Streamline")
    from shortstack.prune.streamline import check_choice, plan_run, streamline

    check_ours(out, "streamline")
    original = training_folder(model)
    check_choice(original, drop, objective, replacement)
    check_apart(out, [original.path])
    train, selection = windows_for(original, text, settings)
    inputs = {
        "model": original.sha256,
        "text": [train, selection],
        "choice": [drop, objective, replacement],
        "settings": dataclasses.asdict(settings),
    }
    key = step_key("streamline", inputs)
    kept = finished(out, key)
    if kept is None:
        with staged(out, "streamline") as partial, _work(out) as work:
            with display.step("Choose the run"):
                plan = plan_run(original, train[:CHOICE_WINDOWS], drop, replacement)
            with display.step("Train the replacement") as progress:
                made, facts = streamline(
                    *(original, plan, train, selection, work, partial, settings),
                    objective=objective,
                    progress=progress,
                    note=display.note,
                    state=beside(out, "healing"),
                )
            facts = {
                **{"run": plan.facts["run"], "drop": list(plan.drop)},
                **{"objective": objective, "replacement": replacement},
                **{"source_sha256": original.sha256, "sha256": made.sha256, **facts},
            }
            kept = write_manifest(partial, "streamline", key, {"streamline": facts})
    return {"checkpoint": str(out), **kept["streamline"]}


@contextlib.contextmanager
def _work(out: Path) -> Iterator[Path]:
    folder = beside(out, "work.partial")
    shutil.rmtree(folder, ignore_errors=True)  # what a hard kill left
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _self_generated(
    teacher: Checkpoint | None,
    train: list[list[int]],
    text: HealText,
    out: Path,
    settings: HealSettings,
    key: str,
    display: Display,
) -> list[list[int]]:
    """Windows that the teacher writes; kept beside the output until that is done."""
    if not text.self_generated_tokens:
        return []
    if teacher is None:
        raise ShortstackError("only a teacher can write text itself. Give it with --teacher.")
    from shortstack.prune.heal.sample import kept_windows, sampled_windows

    beginnings = [window[:BEGINNING_TOKENS] for window in train]
    count = math.ceil(text.self_generated_tokens / settings.window_tokens)
    with display.step("Let the teacher write") as progress:
        make = functools.partial(
            sampled_windows,
            *(teacher, beginnings, settings.window_tokens, count),
            seed=settings.seed,
            device=settings.device,
            progress=progress,
        )
        return kept_windows(beside(out, "samples"), key, make, first=is_first())


def windows_for(
    checkpoint: Checkpoint, text: HealText, settings: HealSettings
) -> tuple[list[list[int]], list[list[int]]]:
    """Training and selection windows. Raises ShortstackError where the text is too short."""
    train, selection = healing_windows(
        read_documents(text.own),
        read_documents(text.general) if text.general else None,
        Encoder(checkpoint),
        settings,
        share=text.share,
        selection_windows=text.selection_windows,
    )
    wanted = settings.steps * settings.batch_windows
    return drawn(train, settings.seed)[:wanted], selection


def training_folder(model: str) -> Checkpoint:
    """Open a model that is trained where it lies. Raises ShortstackError, which says how one
    becomes a folder, for what is none."""
    kind, target = resolve(model)
    if kind != "folder":
        how = "shortstack prune MODEL --drop LAYERS -o FOLDER"
        if kind == "exit":
            exits, _, depth = model.rpartition("@")
            how = f"shortstack exits export {exits} --exit {depth} -o FOLDER"
        if kind == "packed":
            how = f"shortstack unpack {target} -o FOLDER"
        raise ShortstackError(
            f"{model} is no Hugging Face folder: training needs one. Make one of it with {how}."
        )
    return Checkpoint.open(Path(target))
