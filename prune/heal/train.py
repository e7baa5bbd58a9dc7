"""Heal a checkpoint: train it, keep the best state, write that as an ordinary folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.footprint import measured
from shortstack.manifest import step_key
from shortstack.progress import OnProgress, silent
from shortstack.prune.heal.cache import check_cacheable
from shortstack.prune.heal.loop import Loop
from shortstack.prune.heal.model import stored_name
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.heal.sharded import copies
from shortstack.prune.rewrite import rewrite

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def heal(
    student: Checkpoint,
    teacher: Checkpoint | None,
    train_windows: Sequence[Sequence[int]],
    selection_windows: Sequence[Sequence[int]],
    out: Path,
    settings: HealSettings,
    *,
    progress: OnProgress = silent,
    note: Callable[[str], None] = lambda text: None,
    state: Path | None = None,
    cache: Path | None = None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Train `student` towards `teacher`; write the best state into the existing empty `out`.

    Windows are of equal length, in tokens. Best is lowest perplexity on `selection_windows`, step
    0 included: where healing never helps, what is written is the student, and a note says so.
    `state`: a folder for what a killed run goes on from, removed at the end. `cache`: a folder for
    the teacher's `top_k` likeliest tokens of the training windows, made if it is not there, and
    kept; the teacher is not run in training then. Progress counts steps. Several processes may
    come here together (`accelerate launch`): the first one writes.

    The facts: `perplexity_before`, `perplexity_after` (of what is written, rounded to the stored
    type), `best_step`, `steps`, `stopped` (why, if before the end), `tokens_seen`, `tokens_per_s`
    (of training alone), `wall_s`, `peak_bytes` (CUDA memory, or anonymous
    memory of this process), `history`.
    """
    _check(student, teacher, settings)
    if cache is not None:
        check_cacheable(settings)
    key = _key(student, teacher, train_windows, selection_windows, settings)
    with measured() as meter:
        run = Loop(student, teacher, train_windows, selection_windows, settings, note, cache)
        run.train(progress, state, key)
        changed, after = _result(run, student, note)
    written = _write(run, student, changed, out)
    if state is not None and run.accelerator.is_main_process:
        shutil.rmtree(state, ignore_errors=True)
    return written, _facts(run, after, meter.footprint.peak_anon_bytes)


def _write(run: Loop, student: Checkpoint, changed: dict[str, Tensor], out: Path) -> Checkpoint:
    """The first process writes, all open what it wrote."""
    if run.accelerator.is_main_process:
        wide = run.settings.keep_float32
        arrays = {name: tensor.numpy() for name, tensor in changed.items()}
        config = _float32(student.config) if wide else None
        rewrite(student, arrays, out, dtype="F32" if wide else None, config=config)
    run.accelerator.wait_for_everyone()
    written = Checkpoint.open(out)
    run.accelerator.wait_for_everyone()  # the caller moves the folder, in the first process
    return written


def _result(
    run: Loop, student: Checkpoint, note: Callable[[str], None]
) -> tuple[dict[str, Tensor], float]:
    """Tensors to write, and the perplexity of the model with them, rounded as they are stored."""
    at = run.position
    assert at.before is not None
    if not at.best_step:
        if at.step:
            note("healing did not lower the perplexity on selection text: the student is kept")
        return {}, at.before
    run.restore_best()
    model = run.module.model
    changed: dict[str, Tensor] = run.trained
    if run.settings.lora_rank is not None:
        from shortstack.prune.heal.lora import merge_lora

        changed = merge_lora(model)
    changed = {stored_name(name, student): tensor for name, tensor in changed.items()}
    if _ties(model) and (embedding := changed.get(student.family.outer[0].hf)) is not None:
        head = student.family.head.hf  # stored though tied: a copy that must not stay behind
        changed |= {head: embedding} if head in student.tensors else {}
    for name, tensor in changed.items():
        if name not in student.tensors:
            raise ShortstackError(
                f"{student.path} stores no {name} of its own, so it cannot be written. Train "
                "other layers, or report this model."
            )
        stored = STORED["F32" if run.settings.keep_float32 else student.tensors[name].dtype]
        with torch.no_grad():
            tensor.copy_(tensor.to(stored))
    return copies(changed), run.perplexity()


def _ties(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _facts(run: Loop, after: float, peak_bytes: int | None) -> dict[str, Any]:
    at, settings = run.position, run.settings
    if run.device.type == "cuda":
        peak_bytes = int(torch.cuda.max_memory_allocated(run.device))
    seen = at.step * settings.batch_windows * run.windows.shape[1]
    return {
        "perplexity_before": at.before,
        "perplexity_after": after,
        "best_step": at.best_step,
        "steps": at.step,
        "stopped": run.stopped,
        "tokens_seen": seen,
        "tokens_per_s": seen / at.trained_s if at.trained_s else 0.0,
        "wall_s": at.wall_s,
        "peak_bytes": peak_bytes,
        "device": str(run.device),
        "processes": run.accelerator.num_processes,
        "trained_parameters": sum(p.numel() for p in run.trained.values()),
        "history": at.history,
    }


def _key(
    student: Checkpoint,
    teacher: Checkpoint | None,
    train: Sequence[Sequence[int]],
    selection: Sequence[Sequence[int]],
    settings: HealSettings,
) -> str:
    """What decides the run: a state of another one is not gone on from."""
    return step_key(
        "heal-state",
        {
            "student": student.sha256,
            "teacher": teacher.sha256 if teacher else None,
            "windows": [train, selection],
            "settings": dataclasses.asdict(settings),
        },
    )


def _check(student: Checkpoint, teacher: Checkpoint | None, settings: HealSettings) -> None:
    if settings.runs_teacher and teacher is None:
        raise ShortstackError(
            f"loss {settings.loss!r} needs the model that was cut. Give it with --teacher, or "
            "train on text alone with --loss ce."
        )
    if settings.loss == "kl" and teacher is not None and teacher.sha256 == student.sha256:
        raise ShortstackError(
            f"{student.path} is its own teacher, so there is nothing to learn. Name the model that "
            "was cut with --teacher."
        )
    sizes = [c.dims["vocab"] for c in (student, teacher) if c is not None]
    if settings.top_k is not None and settings.top_k >= sizes[0]:
        raise ShortstackError(
            f"top_k is {settings.top_k}, the vocabulary has {sizes[0]} tokens. Leave it out: all "
            "count then."
        )
    if len(set(sizes)) > 1:
        raise ShortstackError(
            f"the student knows {sizes[0]} tokens, the teacher {sizes[1]}. Heal with the model "
            "that was cut."
        )


def _float32(config: Any) -> dict[str, Any]:
    named = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    return {**config, **named}
