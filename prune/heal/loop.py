"""The training loop of healing, on Accelerate: one process or many, CPU or GPU.

Not transformers' Trainer: its saved states are pickles, and its options differ between 4.57 and 5.
"""

from __future__ import annotations

import contextlib
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
from shortstack.progress import OnProgress
from shortstack.prune.calibrate import choose_dtype
from shortstack.prune.heal import state
from shortstack.prune.heal.cache import TeacherCache
from shortstack.prune.heal.interrupt import held_back
from shortstack.prune.heal.model import Student, freeze
from shortstack.prune.heal.order import mixed_seed, rows_of_step
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.heal.sharded import copies, put, whole
from shortstack.prune.scoring import perplexity

MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
SAVE_EVERY_S = 120.0
MOMENTS = ("exp_avg", "exp_avg_sq")


class Loop:
    """A run: built, trained, and asked for the best values of what was trained."""

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint | None,
        train_windows: Sequence[Sequence[int]],
        selection_windows: Sequence[Sequence[int]],
        settings: HealSettings,
        note: Callable[[str], None],
        cache: Path | None = None,
    ) -> None:
        self.settings, self._note = settings, note
        self.windows = _equal(train_windows, "training")
        self.selection = _equal(selection_windows, "selection")
        low = self._start()
        torch.manual_seed(settings.seed)
        self._cache: TeacherCache | None = None
        module = self._module(student, teacher, cache, low)
        trained = [p for p in module.model.parameters() if p.requires_grad]
        if not trained:
            raise ShortstackError(f"train {settings.train!r} leaves nothing to train.")
        self._wrapped, self._optimizer = self.accelerator.prepare(
            module,
            torch.optim.AdamW(
                trained, settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay
            ),
        )
        self.position = state.Position()
        self.stopped: str | None = None
        self._saved_step: int | None = None
        self._best: dict[str, Tensor] = {}

    def _module(
        self, student: Checkpoint, teacher: Checkpoint | None, cache: Path | None, low: bool
    ) -> Any:
        """What is run: gives its summed loss, and has what learns under `model`."""
        model = load(student.path, torch.float32)
        freeze(model, student, self.settings)
        judge: Any = None
        if teacher is not None and self.settings.runs_teacher:
            judge = load(teacher.path, torch.bfloat16 if low else torch.float32)
            judge.requires_grad_(False).to(self.device)
            if cache is not None:
                self._cache = self._fill(cache, teacher, judge)
                judge = None
        return Student(model, judge, self.settings, low)

    @property
    def module(self) -> Any:
        return self.accelerator.unwrap_model(self._wrapped)

    @property
    def trained(self) -> dict[str, Tensor]:
        """What learns, by its name in the model."""
        return {n: p for n, p in self.module.model.named_parameters() if p.requires_grad}

    def perplexity(self) -> float:
        """On the selection windows, each process running its share."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = self._share(self.selection).split(self._micro)
        share = math.ceil(len(self.selection) / self.accelerator.num_processes)
        # Parameters may lie in shards: every process has to run the model equally often.
        idle = math.ceil(share / self._micro) - len(parts)
        self.module.eval()
        with torch.no_grad():
            for tokens in parts:
                total += self.module(tokens.to(self.device), targets_only=True).double()
            for _ in range(idle):
                self.module(self.selection[:1].to(self.device), targets_only=True)
        self.module.train()
        nats = self.accelerator.reduce(total, "sum").item() / self.selection[:, 1:].numel()
        return perplexity(nats) if math.isfinite(nats) else math.inf

    def train(self, progress: OnProgress, folder: Path | None, key: str) -> None:
        """Run the steps that are left; states go to `folder`, from where a killed run goes on.

        Ctrl-C and SIGTERM wait for the end of a step and for its state, a second one does not;
        then KeyboardInterrupt, as without a folder. A note says what is saved.
        """
        if folder is not None:
            self._resume(folder, key)
        self._saved_step = self.position.step or None
        try:
            self._train(progress, folder, key)
        except KeyboardInterrupt:
            self._note(self._interrupted())
            raise

    def _interrupted(self) -> str:
        if self._saved_step is None:
            return "interrupted: no state was saved yet, the same command begins again"
        return f"interrupted: saved at step {self._saved_step}, the same command goes on from there"

    def _train(self, progress: OnProgress, folder: Path | None, key: str) -> None:
        began, at = time.perf_counter(), self.position
        earlier_s, saved_at = at.wall_s, time.perf_counter()
        if at.before is None:
            at.before = at.best = self.perplexity()
            at.history.append({"step": 0, "perplexity": at.before})
        # of several processes one alone must not leave the others waiting for it
        alone = self.accelerator.num_processes == 1
        with held_back(folder is not None and alone) as asked:
            while at.step < self.settings.steps and not asked.to_stop:
                due = time.perf_counter() - saved_at > SAVE_EVERY_S
                loss, due = self._step_or_halve(at.step, due)
                if not math.isfinite(loss):
                    self.stopped = f"the loss of step {at.step + 1} is {loss}"
                    self._note(f"{self.stopped}: stopped, the best state before it is kept")
                    break
                at.step += 1
                at.recent.append(loss)
                self._evaluate_if_due()
                at.wall_s = earlier_s + time.perf_counter() - began
                steps = self.settings.save_steps
                if folder is not None and (at.step % steps == 0 if steps else due):
                    self._save(folder, key)
                    saved_at = time.perf_counter()
                progress(at.step, self.settings.steps)
            unsaved = at.step != (self._saved_step or 0)
            if asked.to_stop and folder is not None and unsaved and self.stopped is None:
                self._save(folder, key)
        if asked.to_stop:
            raise KeyboardInterrupt
        at.wall_s = earlier_s + time.perf_counter() - began

    def restore_best(self) -> None:
        """Put the best values back; where none was better, the model is what it was."""
        if self._best:
            put(self.trained, self._best)

    def _start(self) -> bool:
        """Set up devices and processes; returns whether products run in bfloat16."""
        from accelerate import Accelerator  # type: ignore[import-untyped]

        settings = self.settings
        on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
        low = settings.dtype == "bfloat16"
        if settings.dtype == "auto":  # 1.5 times faster on a CPU that multiplies it in hardware
            low = not on_cpu or choose_dtype("auto") == torch.bfloat16
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        self.device = self.accelerator.device
        sharded = str(self.accelerator.distributed_type).endswith("FSDP")
        if sharded and not getattr(self.accelerator, "is_fsdp2", False):
            raise ShortstackError(
                "healing in shards needs FSDP 2: what FSDP 1 holds has no tensor names. "
                "Set fsdp_version: 2 in the config of accelerate."
            )
        processes = self.accelerator.num_processes
        if settings.batch_windows % processes:
            raise ShortstackError(
                f"{settings.batch_windows} windows a step cannot be shared by {processes} "
                "processes. Choose a multiple with --batch-windows."
            )
        chosen = settings.micro_windows or MICRO_TOKENS[self.device.type] // self.windows.shape[1]
        self._micro = min(max(1, chosen), settings.batch_windows // processes)
        return low

    def _fill(self, folder: Path, teacher: Checkpoint, judge: Any) -> TeacherCache:
        made = TeacherCache(folder, teacher.sha256, self.windows, self.settings)
        turn = (self.accelerator.process_index, self.accelerator.num_processes)
        with torch.no_grad():
            made.fill(judge, self._micro, turn)
        self.accelerator.wait_for_everyone()
        return made

    def _evaluate_if_due(self) -> None:
        at, settings = self.position, self.settings
        # as often as ten times a run, but not so often that it takes longer than the training
        between = max(1, settings.steps // 10, len(self.selection) // settings.batch_windows)
        if at.step % (settings.eval_steps or between) and at.step != settings.steps:
            return
        now, loss = self.perplexity(), sum(at.recent) / len(at.recent)
        at.history.append({"step": at.step, "loss": loss, "perplexity": now})
        at.recent.clear()
        self._note(f"step {at.step}: loss {loss:.4g}, perplexity {now:.4g} on selection text")
        if at.best is None or now < at.best:
            at.best, at.best_step = now, at.step
            self._best = copies(self.trained)

    def _step_or_halve(self, step: int, due: bool) -> tuple[float, bool]:
        began, result = time.perf_counter(), None
        while result is None:
            try:
                result = self._step(step, due)
            except RuntimeError as error:  # on a CPU it is no torch.OutOfMemoryError
                if not _out_of_memory(error):
                    raise
            if result is None:  # out of the handler, which keeps its frames' tensors alive
                self._halve()
        self.position.trained_s += time.perf_counter() - began
        return result

    def _halve(self) -> None:
        halved = self.position.micro_windows is not None
        if halved or self._micro == 1 or self.accelerator.num_processes > 1:
            raise ShortstackError(
                f"out of memory with {self._micro} windows of {self.windows.shape[1]} tokens at "
                "once. Use a lower --micro-windows, shorter windows or --train lora:8."
            )
        self._optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._micro = self.position.micro_windows = self._micro // 2
        self._note(f"out of memory: {self._micro} windows at once from here on, same step size")

    def _step(self, step: int, due: bool) -> tuple[float, bool]:
        """One update; returns its mean loss, and whether the first process wants to save."""
        # So the randomness of a step (dropout) depends on its number alone.
        torch.manual_seed(mixed_seed(self.settings.seed, step))
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate_at(step)
        rows = rows_of_step(
            step, self.settings.batch_windows, len(self.windows), self.settings.seed
        )
        parts = self._share(torch.tensor(rows)).split(self._micro)
        predictions = self.settings.batch_windows * (self.windows.shape[1] - 1)
        total = torch.zeros((), device=self.device)
        for part in parts:
            last = part is parts[-1]
            top = self._cache.read(part.tolist(), self.device) if self._cache else None
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                loss = self._wrapped(self.windows[part].to(self.device), top=top) / predictions
                # processes average their gradients, what is wanted is the sum
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.settings.grad_clip)
        wants = float(due and self.accelerator.is_main_process)
        told = self.accelerator.reduce(torch.stack([total, total.new_tensor(wants)]), "sum")
        loss, wants = told.tolist()
        if math.isfinite(loss) and not math.isfinite(float(whole(norm))):
            loss = math.nan
        if math.isfinite(loss):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss, wants > 0

    def _share(self, windows: Tensor) -> Tensor:
        return windows[self.accelerator.process_index :: self.accelerator.num_processes]

    def _save(self, folder: Path, key: str) -> None:
        tensors = {"model": copies(self.trained), "best": self._best}
        tensors.update({name: copies(self._moments(name)) for name in MOMENTS})
        if self.accelerator.is_main_process:
            state.save(folder, key, self.position, tensors)
        self._saved_step = self.position.step

    def _resume(self, folder: Path, key: str) -> None:
        found = state.load(folder, key)
        if found is None:
            return
        self.position, tensors = found
        self._note(f"going on from step {self.position.step}")
        self._micro = self.position.micro_windows or self._micro
        self._best = tensors["best"]
        put(self.trained, tensors["model"])
        for name, parameter in self.trained.items():
            slots = self._optimizer.state[parameter]
            slots["step"] = torch.tensor(float(self.position.step))
            for moment in MOMENTS:
                slots[moment] = torch.zeros_like(parameter)
                put({name: slots[moment]}, {name: tensors[moment][name]})

    def _moments(self, moment: str) -> dict[str, Tensor]:
        return {n: self._optimizer.state[p][moment] for n, p in self.trained.items()}


def _equal(windows: Sequence[Sequence[int]], what: str) -> Tensor:
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] < 2:
        raise ShortstackError(
            f"{what} windows must have one length of at least 2 tokens, got {lengths}. "
            "Give more text or ask for shorter windows."
        )
    return torch.tensor([list(window) for window in windows])


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
