"""The training loop of healing, on Accelerate: one process or many, CPU or GPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.progress import OnProgress, silent
from shortstack.prune.heal.model import Student, freeze
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.rewrite import rewrite

MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}


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
) -> tuple[Checkpoint, dict[str, Any]]:
    """Train `student` towards `teacher`; write the best state into the existing empty `out`.

    Windows are of equal length, in tokens. Best is lowest perplexity on `selection_windows`, step
    0 included: where healing never helps, what is written is the student. Progress counts steps.
    Returns the checkpoint and the facts: `perplexity_before`, `perplexity_after`, `steps`,
    `best_step`, `tokens_seen`, `tokens_per_s`, `wall_s`, `peak_bytes`, `history`.
    """
    run = _Run(student, teacher, train_windows, selection_windows, settings, note)
    facts = run.train(progress)
    if run.accelerator.is_main_process:
        rewrite(student, run.best_arrays(), out)
    run.accelerator.wait_for_everyone()
    written = Checkpoint.open(out)
    run.accelerator.wait_for_everyone()  # the first process moves the folder afterwards
    return written, facts


class _Run:
    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint | None,
        train_windows: Sequence[Sequence[int]],
        selection_windows: Sequence[Sequence[int]],
        settings: HealSettings,
        note: Callable[[str], None],
    ) -> None:
        from accelerate import Accelerator

        if settings.loss != "ce" and teacher is None:
            raise ShortstackError(
                f"loss {settings.loss!r} needs the model that was cut. Give it with --teacher, or "
                "train on text alone with --loss ce."
            )
        self.settings, self.note = settings, note
        on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
        low = settings.dtype == "bfloat16" or (settings.dtype == "auto" and not on_cpu)
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if low else "no")
        self.device = self.accelerator.device
        torch.manual_seed(settings.seed)
        model = load(student.path, torch.float32, text_only=bool(student.family.nested))
        freeze(model, student, settings)
        model.train()
        judge: Any = None
        if teacher is not None and settings.loss != "ce":
            judge = load(
                teacher.path,
                torch.bfloat16 if low else torch.float32,
                text_only=bool(teacher.family.nested),
            )
            judge.requires_grad_(False).to(self.device)
        self.student = Student(model, judge, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained = trained
        optimizer = torch.optim.AdamW(
            trained,
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        self.windows = torch.tensor([list(window) for window in train_windows])
        self.selection = torch.tensor([list(window) for window in selection_windows])
        self.best: dict[str, Tensor] | None = None

    def perplexity(self) -> float:
        """On the selection windows, each process running its share."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = self._share(self.selection)
        self.wrapped.eval()
        with torch.no_grad():
            for tokens in mine.split(self._micro()):
                total += self.wrapped(tokens.to(self.device), targets_only=True).double()
        self.wrapped.train()
        nats = self.accelerator.reduce(total, "sum").item() / self.selection[:, 1:].numel()
        return math.exp(nats) if nats < 700 else math.inf

    def train(self, progress: OnProgress) -> dict[str, Any]:
        settings, began = self.settings, time.perf_counter()
        before = best = self.perplexity()
        best_step, history = 0, [{"step": 0, "perplexity": before}]
        training_s, losses = 0.0, []
        for step in range(settings.steps):
            at = time.perf_counter()
            losses.append(self._step(step))
            training_s += time.perf_counter() - at
            if not math.isfinite(losses[-1]):
                self.note(f"the loss of step {step + 1} is {losses[-1]}: stopped there")
                break
            if (step + 1) % settings.interval(
                settings.eval_steps
            ) == 0 or step + 1 == settings.steps:
                now = self.perplexity()
                recent = losses[-settings.interval(settings.eval_steps) :]
                history.append(
                    {"step": step + 1, "loss": sum(recent) / len(recent), "perplexity": now}
                )
                self.note(json.dumps(history[-1]))
                if now < best:
                    best, best_step = now, step + 1
                    self._keep()
            progress(step + 1, settings.steps)
        seen = len(losses) * settings.batch_windows * settings.window_tokens
        return {
            "perplexity_before": before,
            "perplexity_after": best,
            "best_step": best_step,
            "steps": len(losses),
            "tokens_seen": seen,
            "tokens_per_s": seen / training_s if training_s else 0.0,
            "wall_s": time.perf_counter() - began,
            "peak_bytes": _peak_bytes(self.device),
            "device": str(self.device),
            "processes": self.accelerator.num_processes,
            "trained_parameters": sum(p.numel() for p in self.trained),
            "history": history,
        }

    def best_arrays(self) -> dict[str, Any]:
        return {name: value.numpy() for name, value in (self.best or {}).items()}

    def _step(self, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(step)
        parts = self._share(self._batch(step)).split(self._micro())
        predictions = self.settings.batch_windows * (self.windows.shape[1] - 1)
        total = torch.zeros((), device=self.device)
        for number, tokens in enumerate(parts, 1):
            with self._sync(number == len(parts)):
                loss = self.wrapped(tokens.to(self.device, non_blocking=True)) / predictions
                # DDP averages over processes what has to be summed
                self.accelerator.backward(loss * self.accelerator.num_processes)
                total += loss.detach()
        self.accelerator.clip_grad_norm_(self.trained, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.accelerator.reduce(total, "sum").item())

    def _sync(self, last: bool) -> Any:
        import contextlib

        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _batch(self, step: int) -> Tensor:
        """Windows of a step: the text in a new order in each pass over it."""
        size, count = self.settings.batch_windows, len(self.windows)
        rows = [self._row(at, count) for at in range(step * size, (step + 1) * size)]
        return self.windows[torch.tensor(rows)]

    def _row(self, at: int, count: int) -> int:
        epoch, place = divmod(at, count)
        if getattr(self, "_order", (None,))[0] != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(count, generator=generator).tolist())
        return int(self._order[1][place])

    def _share(self, windows: Tensor) -> Tensor:
        return windows[self.accelerator.process_index :: self.accelerator.num_processes]

    def _micro(self) -> int:
        length = self.windows.shape[1]
        return self.settings.micro_windows or max(1, MICRO_TOKENS[self.device.type] // length)

    def _keep(self) -> None:
        model = self.accelerator.unwrap_model(self.wrapped).model
        self.best = {
            name: p.detach().float().cpu().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
