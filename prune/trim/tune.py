"""Supervised tuning on questions: on the right continuation, or on the choice among them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortstack.errors import ShortstackError
from shortstack.prune.trim.batch import batch_of, packed
from shortstack.prune.trim.rows import Example, Row
from shortstack.prune.trim.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.trim.model import TrimModel, Unit

CLIP = 1.0
LAST_RATE = 0.1
"""Each round's rate falls linearly to this share: it is scanned, and perhaps kept, at its end."""
POOL_BATCHES = 8
"""Rows are sorted by length in pools of this many batches: little padding, mixed steps."""


class NotFiniteError(ShortstackError):
    """The loss became NaN or infinite; `step` counts from 1 within the round."""

    def __init__(self, step: int, where: str) -> None:
        super().__init__(f"the loss is not finite at step {step} of {where}.")
        self.step = step


@dataclass(frozen=True)
class Round:
    """What one round of tuning took: mean loss of its steps in nats (an id for the objective
    `answer`, a question for `choices`), ids read, optimizer steps."""

    loss: float
    n_tokens: int
    n_steps: int


class Tuner:
    """AdamW over the units that train; its state survives from round to round."""

    def __init__(self, model: TrimModel, settings: Settings, trained: Sequence[Unit]) -> None:
        import torch

        self._model, self._settings = model, settings
        self.pieces = 1
        """How many parts a batch is run in: 2 once the memory did not hold it whole."""
        self.trained = frozenset(trained)
        names = self._names()
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(name in names)
        self.parameters = {
            name: parameter
            for name, parameter in model.hf.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.rate,
            weight_decay=0.0,
            fused=model.device.type == "cuda",
        )

    def _names(self) -> set[str]:
        if self.trained >= set(self._model.all_units):
            return {name for name, _ in self._model.hf.named_parameters()}
        return {name for unit in self.trained for name in self._model.parameters_of(unit)}

    def round(self, examples: Sequence[Example], number: int, on_step: Callable[[], None]) -> Round:
        """Tune on `rows_per_epoch` of the examples, `epochs` times. The same `number`, seed and
        state give the same result."""
        import torch

        batches = self._batches(examples, number)
        losses: list[Tensor] = []
        n_tokens = 0
        for step, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self._settings.rate * self._decay(step, len(batches), number)
            losses.append(self._step(batch))
            n_tokens += sum(map(_n_ids, batch))
            on_step()
        # One look at the end, not one a step: reading a loss waits for the GPU.
        finite = torch.stack(losses).isfinite().tolist()
        if not all(finite):
            raise NotFiniteError(finite.index(False) + 1, f"round {number}")
        return Round(torch.stack(losses).mean().item(), n_tokens, len(batches))

    def _decay(self, step: int, n_steps: int, number: int) -> float:
        warm = min(1.0, (step + 1) / 10) if number == 0 else 1.0
        return warm * (1 - (1 - LAST_RATE) * step / n_steps)

    def _batches(self, examples: Sequence[Example], number: int) -> list[list[Example]]:
        size, shuffled = self._settings.batch_rows, random.Random(f"{self._settings.seed}-{number}")
        batches: list[list[Example]] = []
        for _ in range(self._settings.epochs):
            count = min(len(examples), self._settings.rows_per_epoch)
            drawn = shuffled.sample(list(examples), count)
            for start in range(0, len(drawn), size * POOL_BATCHES):
                pool = sorted(drawn[start : start + size * POOL_BATCHES], key=_length)
                found = [pool[at : at + size] for at in range(0, len(pool), size)]
                batches += shuffled.sample(found, len(found))
        return batches

    def _step(self, batch: Sequence[Example]) -> Tensor:
        import torch

        loss = self._gradients_if_they_fit(batch)
        if loss is None:  # outside the handler: there the failed attempt would still hold memory
            self.pieces = 2
            loss = self._gradients_if_they_fit(batch)
            assert loss is not None
        alive = [p for p in self.parameters.values() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(alive, CLIP)
        self.optimizer.step()
        return loss

    def _gradients_if_they_fit(self, batch: Sequence[Example]) -> Tensor | None:
        import torch

        try:
            return self._gradients(batch)
        except torch.OutOfMemoryError:
            if self.pieces == 1 and len(batch) > 1:
                return None
        raise _too_large(-(-len(batch) // self.pieces))

    def _gradients(self, batch: Sequence[Example]) -> Tensor:
        """Gradients of the whole batch's mean loss, which is returned, in `pieces` parts."""
        self.optimizer.zero_grad(set_to_none=True)
        objective = self._settings.objective
        total, losses = _size(batch, objective), []
        size = -(-len(batch) // self.pieces)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            loss = LOSSES[objective](self._model, part) * (_size(part, objective) / total)
            loss.backward()
            losses.append(loss.detach())
        summed: Tensor = sum(losses[1:], losses[0])
        return summed


def _too_large(n_rows: int) -> ShortstackError:
    return ShortstackError(
        f"out of memory with batches of {n_rows} rows. Use smaller ones or shorter prompts."
    )


def _length(example: Example) -> int:
    return max(len(row.inputs) for row in example.rows)


def _n_ids(example: Example) -> int:
    """Ids that the model reads for one question."""
    return sum(len(inputs) for inputs, _ in packed(example.rows)[0])


def answer_loss(model: TrimModel, batch: Sequence[Example]) -> Tensor:
    """Mean cross entropy over all ids of the right continuations, in nats."""
    logs, _ = _log_probabilities(model, [example.rows[example.answer] for example in batch])
    return -logs.mean()


def choices_loss(model: TrimModel, batch: Sequence[Example]) -> Tensor:
    """Mean cross entropy over the choices' log-likelihoods, in nats a question.

        L = -1/B sum_q ( s(q, a_q) - log sum_c exp s(q, c) ),   s(q, c) = sum_t log p(c_t | q, c_<t)

    with a_q the right choice of question q. s is a sum over the choice's ids, not their mean, as
    in the scan: L is the `nats` of an exam on the same questions.
    """
    import torch

    logs, choice = _log_probabilities(model, [row for example in batch for row in example.rows])
    counts = [len(example.rows) for example in batch]
    sums = torch.zeros(sum(counts), device=logs.device).index_add(0, choice, logs)
    table = torch.nn.utils.rnn.pad_sequence(
        list(sums.split(counts)), batch_first=True, padding_value=-torch.inf
    )
    answers = torch.tensor([example.answer for example in batch], device=logs.device)
    return torch.nn.functional.cross_entropy(table, answers)


def _log_probabilities(model: TrimModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """log p of every id of the rows' continuations, float32, and the number of its row."""
    import torch

    batch = batch_of(packed(rows)[0], model.device)
    with model.autocast():
        hidden = model.decoder(input_ids=batch.tokens, use_cache=False)[0]
        logits = model.head(hidden[batch.row, batch.position])
    return -torch.nn.functional.cross_entropy(logits, batch.target, reduction="none"), batch.choice


LOSSES = {"answer": answer_loss, "choices": choices_loss}


def _size(batch: Sequence[Example], objective: str) -> int:
    """How many things the objective's loss is the mean of: ids, or questions."""
    if objective == "choices":
        return len(batch)
    return sum(len(example.rows[example.answer].answer) for example in batch)
