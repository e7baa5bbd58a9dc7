"""Learn codes, steps, norms and biases by distillation, at the bits that were asked for."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.progress import OnProgress
from shortstack.prune.calibrate import choose_dtype
from shortstack.prune.heal import state as saved
from shortstack.prune.heal.distill import divergence, summed_loss
from shortstack.prune.heal.model import final_hidden, head_of
from shortstack.prune.heal.order import rows_of_step
from shortstack.prune.quantize import LearningText, QuantizeSettings
from shortstack.prune.quantize.device import device_of, exact_heads
from shortstack.prune.quantize.latent_model import LatentModel, Snapshot
from shortstack.prune.quantize.matrices import Floats, Matrix
from shortstack.prune.quantize.rate import MatrixRate, rate_of
from shortstack.row_codes import RowCodes, RowCodesWriter

MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
BETAS, EPSILON = (0.9, 0.98), 1e-15
"""Gradients of single codes are of the order of 1e-9."""

WARMUP = 0.05
SCALE_RATE = 2.5e-4
"""Of rows' factors, and of norms and biases relative to their root mean square, as in `tune`."""

CHECKS, LAST_STRETCH = 8, 0.8
"""How often a run looks at the held-out windows and sets its bits right again; that no more in the
last part of its steps, which mend what it does to codes."""

TOLERANCE = 0.01
"""Bits a weight that a state may take beyond what was asked for and still be chosen. Only one that
takes more is stretched: where few codes are near a threshold, a stretch moves no code and all
weights by the same share, which costs more than a hundredth of a bit brings."""

SAVE_EVERY_S = 120.0
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Learned:
    """The best state, and what is known of the run: `history` has KL in nats a token on held-out
    windows and bits a weight of the matrices, by step."""

    best: Snapshot
    facts: dict[str, Any]


def learned(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    wanted_bits: float,
    out: Path,
    settings: QuantizeSettings,
    text: LearningText,
    start: Callable[[OnProgress], object],
    progress: OnProgress,
) -> tuple[list[MatrixRate], dict[str, Floats], dict[str, Any]]:
    """Learn from what `start` puts into the sidecar in `out`, which is then written anew.

    Rates of the matrices, norms and biases that learned, and facts of the run. Progress counts
    batches, and for the start a tenth as many more.
    """
    length = len(text.windows[0])
    steps = math.ceil(settings.learn_tokens / (max(1, settings.batch_tokens // length) * length))
    before = math.ceil(steps / 10)
    start(lambda done, total: progress(before * done // total, before + steps))
    model = LatentModel(checkpoint, out, device_of(settings.device))
    run = Learner(checkpoint, model, text, wanted_bits, settings)
    found = run.run(lambda done, _: progress(before + done, before + steps), text.state, text.key)
    rates = write_learned(out, matrices, model, found.best)
    if text.state is not None:
        shutil.rmtree(text.state, ignore_errors=True)
    changed = {name: values.float().numpy() for name, values in found.best.vectors.items()}
    return rates, changed, {"learning": found.facts}


class Learner:
    """A run: KL(original || quantized) falls by Adam on latent codes, rows' factors and vectors.

    What products read is always codes times steps, so that what is measured is what is written.
    Bits are held by stretching all steps alike where they are exceeded: by 2^(bits - wanted),
    weights where they are. Rounding noise of another shape takes no bits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: LatentModel,
        text: LearningText,
        wanted_bits: float,
        settings: QuantizeSettings,
    ) -> None:
        self.model, self._settings, self._note = model, settings, text.note
        self._wanted = wanted_bits
        self._device = device_of(settings.device)
        self._windows, self._held = torch.tensor(text.windows), torch.tensor(text.held_out)
        length = self._windows.shape[1]
        self._batch = max(1, settings.batch_tokens // length)
        self._micro = max(1, MICRO_TOKENS[self._device.type] // length)
        self.steps = math.ceil(settings.learn_tokens / (self._batch * length))
        self._low = self._device.type == "cuda" or choose_dtype("auto") == torch.bfloat16
        self._teacher = load(checkpoint.path, torch.float32).to(self._device).requires_grad_(False)
        self._optimizer = self._make_optimizer()
        self._position = saved.Position()
        self._best = model.snapshot()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """One group for each rate: of latent codes, of factors, of every vector."""
        of_rate: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.learnt().items():
            rate = SCALE_RATE
            if name.endswith(".latent"):
                rate = self._settings.learning_rate
            elif not name.endswith(".factors"):
                rate *= max(float(parameter.detach().square().mean().sqrt()), 1e-3)
            of_rate.setdefault(rate, []).append(parameter)
        self._rates = list(of_rate)
        groups = [{"params": params, "lr": rate} for rate, params in of_rate.items()]
        return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)

    def run(self, progress: OnProgress, folder: Path | None = None, key: str = "") -> Learned:
        """Go through the steps that are left; `folder` keeps what a killed run goes on from."""
        began = saved_at = time.perf_counter()
        if folder is not None:
            self._resume(folder, key)
        at = self._position
        earlier_s = at.wall_s
        with exact_heads(self._device):
            if not at.history:
                self._check()
            every = max(1, self.steps // CHECKS)
            while at.step < self.steps:
                loss = self._step(at.step)
                if not math.isfinite(loss):
                    self._note(f"step {at.step + 1}: the loss is {loss}; the best state is kept")
                    break
                at.step += 1
                at.recent.append(loss)
                if at.step % every == 0 or at.step == self.steps:
                    self._check()
                at.wall_s = earlier_s + time.perf_counter() - began
                if folder is not None and time.perf_counter() - saved_at > SAVE_EVERY_S:
                    self._save(folder, key)
                    saved_at = time.perf_counter()
                progress(at.step, self.steps)
        return Learned(self._best, self._facts())

    def _facts(self) -> dict[str, Any]:
        at = self._position
        if at.best is None:
            self._note("no state has the bits asked for and a finite KL: the start is kept")
        return {
            "steps": at.step,
            "best_step": at.best_step,
            "tokens_seen": at.step * self._batch * self._windows.shape[1],
            "kl_held_out_before": at.before,
            "kl_held_out_after": at.before if at.best is None else at.best,
            "wall_s": round(at.wall_s, 1),
            "device": str(self._device),
            "history": at.history,
        }

    def rate_at(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0: warm-up, then half a cosine."""
        warm = math.ceil(WARMUP * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def _step(self, step: int) -> float:
        share = self.rate_at(step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        rows = rows_of_step(step, self._batch, len(self._windows), self._settings.seed)
        chosen = self._windows[torch.tensor(rows)]
        predictions = chosen[:, 1:].numel()
        total = 0.0
        for part in chosen.split(self._micro):
            loss = self._loss(part.to(self._device), self._low) / predictions
            loss.backward()
            total += float(loss.detach())
        if math.isfinite(total):
            for one in self.model.parts:
                one.take_gradient()
            self._optimizer.step()
            for matrix in self.model.matrices.values():
                matrix.bound()
            self.model.put()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, tokens: Tensor, low: bool) -> Tensor:
        """Sum of KL over the positions of windows."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
            with torch.no_grad():
                wanted = final_hidden(self._teacher, tokens)
            found = final_hidden(self.model.module, tokens)
        # the head's products in bfloat16 would be off by more than the distance that is left
        on_card = self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=low and not on_card):
            head = head_of(self._teacher)
            if on_card:
                wanted, found = wanted.float(), found.float()
            chunk = divergence(lambda rows: head.logits(wanted[rows]))
            return summed_loss(found, head_of(self.model.module), chunk)

    @torch.no_grad()
    def _divergence(self) -> float:
        low = self._low and self._device.type != "cuda"
        parts = self._held.split(self._micro)
        total = sum(float(self._loss(part.to(self._device), low)) for part in parts)
        return total / self._held[:, 1:].numel()

    def _check(self) -> None:
        """Look at held-out windows, keep the state if it is the best, then set its bits right.

        The best is the nearest to the original of those that fit the bits; where none does, the
        start, which took what was asked for as far as rounding could.
        """
        at, model = self._position, self.model
        kl, bits = self._divergence(), model.bits() / model.n_codes
        wanted = self._wanted / model.n_codes
        first, finite = not at.history, math.isfinite(kl)
        at.history.append({"step": at.step, "kl": kl if finite else None, "bits": bits})
        if at.recent:
            at.history[-1]["loss"] = sum(at.recent) / len(at.recent)
            at.recent.clear()
        if first and finite:
            at.before = kl
        fits = finite and bits < wanted + TOLERANCE
        better = fits and (at.best is None or kl < at.best)
        if first or better:
            at.best_step, self._best = at.step, model.snapshot()
        if better:
            at.best = kl
        self._note(f"step {at.step}: KL {kl:.5f} nats a token held out, {bits:.4f} bits a code")
        if at.step < LAST_STRETCH * self.steps and bits > wanted + TOLERANCE:
            for matrix in model.matrices.values():
                matrix.stretch(2.0 ** (bits - wanted))
            model.put()

    def _save(self, folder: Path, key: str) -> None:
        model = self.model
        tensors = {"latent": {n: p.detach() for n, p in model.learnt().items()}}
        tensors["base"] = {name: m.base for name, m in model.matrices.items()}
        for moment in MOMENTS:
            tensors[moment] = {
                n: self._optimizer.state[p][moment] for n, p in model.learnt().items()
            }
        tensors["vectors"] = self._best.vectors
        codes, steps = {}, {}
        for name, made in self._best.matrices.items():
            codes[name], steps[name] = torch.from_numpy(made.codes), torch.from_numpy(made.steps)
        saved.save(folder, key, self._position, {**tensors, "codes": codes, "steps": steps})

    def _resume(self, folder: Path, key: str) -> None:
        found = saved.load(folder, key)
        if found is None:
            return
        model = self.model
        self._position, tensors = found
        self._note(f"going on from step {self._position.step}")
        with torch.no_grad():
            for name, matrix in model.matrices.items():
                matrix.base.copy_(tensors["base"][name])
            for name, parameter in model.learnt().items():
                parameter.copy_(tensors["latent"][name])
                slots = self._optimizer.state[parameter]
                slots["step"] = torch.tensor(float(self._position.step), device=self._device)
                for moment in MOMENTS:
                    slots[moment] = tensors[moment][name].to(self._device)
        codes, steps = tensors["codes"], tensors["steps"]
        made = {name: RowCodes(codes[name].numpy(), steps[name].numpy()) for name in codes}
        self._best = Snapshot(made, tensors["vectors"])
        model.put()


def write_learned(
    out: Path, matrices: Sequence[Matrix], model: LatentModel, best: Snapshot
) -> list[MatrixRate]:
    """Write the sidecar anew, with the codes and steps that were learned; the rates of them."""
    made = {**best.matrices, **model.kept}
    rates = []
    with RowCodesWriter(out, {m.name: (m.rows, m.columns) for m in matrices}) as writer:
        for matrix in matrices:
            found = made[matrix.name]
            writer.write(matrix.name, found)
            shape, step = (matrix.rows, matrix.columns), float(np.median(found.steps))
            rates.append(rate_of(matrix.name, shape, found.codes, step))
    return rates
