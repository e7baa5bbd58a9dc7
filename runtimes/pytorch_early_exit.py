"""Answers that leave a model early: batches whose rows end after different layers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shortstack.early_exit.batches import Batch, batches
from shortstack.early_exit.checks import Checks, ModelHead
from shortstack.early_exit.prompts import Prompt
from shortstack.early_exit.rule import PROBE, Answer, Rule
from shortstack.early_exit.watched import Run, watched
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent

OF_ROWS = ("attention_mask", "position_ids", "position_embeddings")
"""What a decoder gives its layers that may have a row for each sequence."""


class Answerer:
    """A model that answers prompts with one decision each; without a rule all go to the end."""

    def __init__(self, model: Any, rule: Rule | None = None) -> None:
        self._model = model
        self._head = ModelHead(model)
        self._checks = None if rule is None else Checks(rule, self._head)
        self.n_layers = len(model.get_decoder().layers)
        if rule is not None and rule.layers[-1] >= self.n_layers:
            raise ShortstackError(
                f"the early exit checks after {rule.layers[-1]} layers, the model has "
                f"{self.n_layers}. Fit one to this model."
            )

    @property
    def device(self) -> Any:
        return self._head.device

    def answer(
        self,
        prompts: Sequence[Prompt],
        batch_tokens: int | None = None,
        progress: OnProgress = silent,
    ) -> list[Answer]:
        """Answers in the order of the prompts.

        Raises ShortstackError for a probe that was fitted to other answers.
        """
        self._check_answers(prompts)
        found: dict[int, Answer] = {}
        for batch in batches(prompts, self._head.device, batch_tokens):
            found.update(zip(batch.index, self.answer_batch(batch), strict=True))
            progress(len(found), len(prompts))
        return [found[at] for at in range(len(prompts))]

    def _check_answers(self, prompts: Sequence[Prompt]) -> None:
        if self._checks is None or self._checks.rule.check != PROBE:
            return
        known = self._checks.rule.answers
        for prompt in prompts:
            if prompt.words != known:
                raise ShortstackError(
                    f"question {prompt.id}: the early exit's probe knows the answers "
                    f"{', '.join(known)}, not {', '.join(prompt.words)}. Fit one with "
                    "--check answers."
                )

    def answer_batch(self, batch: Batch) -> list[Answer]:
        leaving = _Leaving(batch, self._head, self._checks)
        with (
            contextlib.suppress(_AllLeftError),
            torch.inference_mode(),
            watched(self._model, leaving.on_layer),
        ):
            made = self._model.get_decoder()(input_ids=batch.tokens, use_cache=False)
            leaving.end(made.last_hidden_state, self.n_layers)
        return leaving.answers


class _AllLeftError(Exception):
    """Nobody wants the rest of the decoder, its last norm neither."""


class _Leaving:
    """One batch on its way: the rows that are still in it."""

    def __init__(self, batch: Batch, head: ModelHead, checks: Checks | None) -> None:
        self._batch, self._head, self._checks = batch, head, checks
        self._n_rows = len(batch.index)
        self._last = batch.last
        self._places = torch.arange(self._n_rows, device=batch.last.device)
        self._head_rows = head.rows(batch.answers)
        self.rows: Tensor | None = None
        """Numbers of the rows that have not left; None while that is all."""
        self._numbers = list(range(self._n_rows))
        self._found: dict[int, Answer] = {}

    @property
    def answers(self) -> list[Answer]:
        return [self._found[row] for row in range(self._n_rows)]

    def on_layer(self, index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        hidden = run(hidden, **self._remaining(named))
        check = None if self._checks is None else self._checks.rule.at(index + 1)
        return hidden if check is None else self._without_leavers(check, hidden, index + 1)

    def _remaining(self, named: dict[str, Any]) -> dict[str, Any]:
        if self.rows is None:
            return named
        return {k: self._rows_of(v) if k in OF_ROWS else v for k, v in named.items()}

    def _rows_of(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._rows_of, value))
        if isinstance(value, dict):  # Gemma 3: a rotation for each kind of layer
            return {kind: self._rows_of(one) for kind, one in value.items()}
        if value is None or self._n_rows == 1 or value.shape[0] != self._n_rows:
            return value
        return value[self.rows]

    def _without_leavers(self, check: int, hidden: Tensor, n_run: int) -> Tensor:
        assert self._checks is not None
        found = self._checks.decide(check, self._at_last(hidden), self._head_rows)
        staying = []
        for place, (score, answer) in enumerate(found):
            if score >= self._checks.threshold:
                self._found[self._numbers[place]] = Answer(answer, n_run)
            else:
                staying.append(place)
        if len(staying) == len(self._numbers):
            return hidden
        self._numbers = [self._numbers[place] for place in staying]
        if not staying:
            raise _AllLeftError
        return self._shrink(hidden, torch.tensor(staying))

    def _at_last(self, hidden: Tensor) -> Tensor:
        if self._n_rows == 1:  # alone it is not filled up
            return hidden[:, -1]
        return hidden[self._places, self._last]

    def _shrink(self, hidden: Tensor, staying: Tensor) -> Tensor:
        """`staying`: places among the rows that are left, on the host."""
        weight, bias, absent = self._head_rows
        if len(weight) > 1:
            bias, absent = (None if one is None else one[staying] for one in (bias, absent))
            self._head_rows = weight[staying], bias, absent
        there = staying.to(hidden.device)
        self.rows = there if self.rows is None else self.rows[there]
        self._last, self._places = self._last[there], self._places[: len(there)]
        return hidden[there]

    def end(self, normed: Tensor, n_layers: int) -> None:
        """Those who stayed answer with the whole model's states, which the last norm has seen."""
        logits = self._head.answer_logits(self._at_last(normed), self._head_rows)
        for number, answer in zip(self._numbers, logits.argmax(-1).tolist(), strict=True):
            self._found[number] = Answer(int(answer), n_layers)
