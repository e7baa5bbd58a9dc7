"""Train what costs no bits: the steps of rows, norms and biases, towards the original model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress
from shortstack.prune.calibrate import LayerwiseModel, choose_dtype
from shortstack.prune.heal.distill import Chunk, Head, divergence, summed_loss
from shortstack.prune.heal.model import final_hidden, head_of, is_gone, stored_name
from shortstack.prune.heal.order import rows_of_step
from shortstack.prune.quantize.matrices import Matrix
from shortstack.prune.quantize.rate import MatrixRate
from shortstack.prune.quantize.uniform import LEAST_STEP
from shortstack.row_codes import RowCodesReader, replace_steps

STEP_TOKENS = 1024
LEARNING_RATE, FINAL_RATE, WARMUP = 2.5e-4, 0.05, 0.1
"""The rate is of a row's factor, and of other tensors relative to their root mean square. It rises
over WARMUP of the steps and falls as a cosine to FINAL_RATE of itself."""

BETAS = (0.9, 0.98)
HELD_OUT = 12
"""One calibration window in so many is not trained on but chooses the state that is kept."""

CHECKS = 4
"""How often a run looks at the held-out windows."""


@dataclass(frozen=True)
class Original:
    """The model to stay near to: its head, a copy, and what that read of each batch of windows,
    (windows, length - 1, width)."""

    head: Head
    finals: list[Tensor]

    @classmethod
    def of(cls, model: LayerwiseModel) -> Original:
        """Before anything is rounded; `finals` are still to be noted."""
        head = head_of(model.module)
        bias = None if head.bias is None else head.bias.detach().clone()
        return cls(replace(head, weight=head.weight.detach().clone(), bias=bias), [])


@dataclass(frozen=True)
class Tuned:
    """What was learned: factors on the steps, name -> (rows,), and whole tensors, name -> values.

    `kl`: nats a token to the original model on the held-out windows, by step.
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)


def tune(
    checkpoint: Checkpoint,
    model: LayerwiseModel,
    parts: Sequence[Tensor],
    original: Original,
    steps: int,
    seed: int,
    progress: OnProgress,
) -> Tuned:
    """Minimize KL(original || quantized) over `steps` batches of about STEP_TOKENS tokens.

    `model` has quantized weights; `parts`: batches of windows of tokens, all of one length. A step
    learns by a factor on what its row gives, so that no gradient of a whole matrix exists. Products
    are in bfloat16 where the device multiplies it in hardware. At least two windows are needed:
    one is held out.
    """
    windows, finals = torch.cat(list(parts)), torch.cat(original.finals)
    run = _Tuner(checkpoint, model, windows, finals, original.head, steps, seed)
    with run.hooked():
        return run.train(progress)


def write_tuned(
    out: Path, matrices: Sequence[Matrix], tuned: Tuned, rates: Sequence[MatrixRate]
) -> list[MatrixRate]:
    """Put the learned steps into the sidecar in `out`, as float16 and positive; the rates with
    their medians."""
    sidecar = RowCodesReader(out)
    steps: dict[str, NDArray[np.float16]] = {}
    for name, factors in tuned.factors.items():
        wide = sidecar.read(name).steps.astype(np.float32) * factors.cpu().numpy()
        steps[name] = np.maximum(wide, LEAST_STEP).astype(np.float16)
    replace_steps(out, {m.name: (m.rows, m.columns) for m in matrices}, steps)
    return [
        replace(rate, step=float(np.median(steps[rate.name]))) if rate.name in steps else rate
        for rate in rates
    ]


class _Tuner:
    def __init__(
        self,
        checkpoint: Checkpoint,
        model: LayerwiseModel,
        windows: Tensor,
        finals: Tensor,
        head: Head,
        steps: int,
        seed: int,
    ) -> None:
        held = torch.arange(len(windows)) % HELD_OUT == min(HELD_OUT, len(windows)) - 1
        self._held, self._learnt = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
        self._windows, self._finals, self._original = windows, finals, head
        self._module, self._steps, self._seed = model.module, steps, seed
        self._batch = max(1, min(len(self._learnt), STEP_TOKENS // windows.shape[1]))
        device = windows.device.type
        self._low = device == "cuda" or choose_dtype("auto") == torch.bfloat16
        model.freeze()
        self._modules = _row_modules(checkpoint, model)
        self._factors = {
            name: nn.Parameter(torch.ones(len(module.weight), device=module.weight.device))
            for name, module in self._modules.items()
        }
        self._tensors = _vectors(checkpoint, self._module)
        self._embedding = checkpoint.family.outer[0].hf
        self._at_head = self._embedding if checkpoint.tied else checkpoint.family.head.hf
        self._head_gradient = torch.zeros(0)

    def train(self, progress: OnProgress) -> Tuned:
        learned = {**self._factors, **self._tensors}
        rates = [1.0] * len(self._factors) + [
            max(float(t.detach().square().mean().sqrt()), 1e-3) for t in self._tensors.values()
        ]
        groups = [{"params": [p], "lr": r} for p, r in zip(learned.values(), rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=1e-10, weight_decay=0.0)
        kl = {0: self._divergence()}
        best = {name: p.detach().clone() for name, p in learned.items()}
        for step in range(self._steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_at(step, self._steps)
            optimizer.zero_grad(set_to_none=True)
            chosen = rows_of_step(step, self._batch, len(self._learnt), self._seed)
            self._backward(self._learnt[torch.tensor(chosen)])
            nn.utils.clip_grad_norm_(learned.values(), 1.0)
            optimizer.step()
            if (step + 1) % max(1, self._steps // CHECKS) == 0 or step + 1 == self._steps:
                kl[step + 1] = self._divergence()
                if kl[step + 1] == min(kl.values()):  # a NaN is no minimum
                    best = {name: p.detach().clone() for name, p in learned.items()}
            progress(step + 1, self._steps)
        with torch.no_grad():
            for name, p in learned.items():
                p.copy_(best[name])
        return Tuned(
            {name: best[name] for name in self._factors},
            {name: best[name] for name in self._tensors},
            kl,
        )

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Rows of every matrix give what they would with their steps times the factors."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                if isinstance(module, nn.Linear):
                    if name != self._at_head:  # the loss multiplies that itself
                        hook = _output_times(self._factors[name])
                        stack.callback(module.register_forward_hook(hook).remove)
                else:
                    hook = _lookup_times(self._factors[name])
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _loss(self, rows: Tensor, learn: bool) -> Tensor:
        """Sum of KL over the positions of the windows `rows`."""
        tokens, finals = self._windows[rows], self._finals[rows].flatten(0, 1)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._low):
            chunk = divergence(lambda part: self._original.logits(finals[part]))
            factors = self._factors.get(self._at_head)
            if factors is not None:
                self._head_gradient = torch.zeros_like(factors)
                chunk = _times_rows(chunk, factors.detach(), self._head_gradient, learn)
            return summed_loss(final_hidden(self._module, tokens), head_of(self._module), chunk)

    def _backward(self, rows: Tensor) -> None:
        predictions = len(rows) * (self._windows.shape[1] - 1)
        (self._loss(rows, True) / predictions).backward()
        factors = self._factors.get(self._at_head)
        if factors is not None:
            gradient = self._head_gradient / predictions
            factors.grad = gradient if factors.grad is None else factors.grad.add_(gradient)

    def _divergence(self) -> float:
        with torch.no_grad():
            total = sum(
                float(self._loss(rows, False)) for rows in self._held.split(max(1, self._batch))
            )
        return total / (len(self._held) * (self._windows.shape[1] - 1))


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0."""
    warm = math.ceil(WARMUP * steps)
    if step < warm:
        return LEARNING_RATE * (step + 1) / warm
    at = (step - warm) / max(1, steps - warm)
    return LEARNING_RATE * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * at)))


def _row_modules(checkpoint: Checkpoint, model: LayerwiseModel) -> dict[str, Any]:
    """Stored name of every matrix whose steps learn -> the module that multiplies it.

    A head with a cap on its logits keeps its steps: the factor lies within the cap.
    """
    family = checkpoint.family
    found = {
        f"{family.layer_prefix.format(i=index)}{name}.weight": module
        for index in range(model.n_layers)
        for name, module in model.projections(index).items()
    }
    capped = head_of(model.module).cap is not None
    if not (capped and checkpoint.tied):
        found[family.outer[0].hf] = model.module.get_input_embeddings()
    if not (capped or checkpoint.tied):
        found[family.head.hf] = model.module.get_output_embeddings()
    return {name: module for name, module in found.items() if not is_gone(name, checkpoint)}


def _vectors(checkpoint: Checkpoint, module: Any) -> dict[str, nn.Parameter]:
    """Norms and biases of the decoder by their stored names, asking for gradients."""
    named = ((stored_name(name, checkpoint), p) for name, p in module.named_parameters())
    found = {
        name: p
        for name, p in named
        if p.ndim == 1 and name in checkpoint.tensors and not is_gone(name, checkpoint)
    }
    for p in found.values():
        p.requires_grad_(True)
    return found


def _output_times(factors: Tensor) -> Any:
    def scaled(module: nn.Linear, inputs: Any, output: Tensor) -> Tensor:
        if module.bias is None:
            return output * factors
        return (output - module.bias) * factors + module.bias

    return scaled


def _lookup_times(factors: Tensor) -> Any:
    def scaled(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * factors[inputs[0]][..., None]

    return scaled


def _times_rows(chunk: Chunk, factors: Tensor, gradient: Tensor, learn: bool) -> Chunk:
    """`chunk` of logits whose rows of the head are multiplied; adds the factors' `gradient`."""

    def multiplied(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, upstream = chunk(rows, logits * factors)
        if learn:
            gradient.add_((upstream * logits).sum(0))
        return loss, upstream.mul_(factors)

    return multiplied
