"""A rule at work: of hidden states at one depth, who leaves, and with what answer.

The decision has to be on the host, so that the copy of the states is the check's one wait for the
device; what follows is too little work to be worth launching kernels for. The whole head is not.
Of one prompt alone the copy is of one row as it lies there: no kernel is launched for a check.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shortstack.early_exit.numbers import probability_features, scores, unit
from shortstack.early_exit.row import row_features
from shortstack.early_exit.rule import ANSWERS, PROBE, STATE, VOCABULARY, Rule

NOT_ONE = -1
"""Fills up rows of answers that have fewer than others."""
ON_HOST = 1 << 16
"""So many numbers of states are normed on the host; a norm of more is worth its kernels."""
AnswerRows = tuple[Tensor, Tensor | None, Tensor | None]
"""The head's rows of answers: weights (rows, most, width), biases and absence (rows, most), float32
on the host; None: there are none. One row for all rows where they are alike."""


class ModelHead:
    """The last norm and the head of a transformers model, whole or by rows.

    What it keeps on the host it reads from the model once: weights that change later need another.
    """

    def __init__(self, model: Any) -> None:
        self._norm = model.get_decoder().norm
        output, config = model.get_output_embeddings(), model.config.get_text_config()
        self.output: nn.Module = output
        self._weight, self._bias = output.weight, output.bias
        self._scale = 1 / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.device, self.dtype = output.weight.device, output.weight.dtype
        there = self.device.type != "cpu"
        self._host_norm = copy.deepcopy(self._norm).to("cpu") if there else self._norm
        self._known: tuple[tuple[int, ...], ...] = ()
        self._rows: AnswerRows | None = None

    def only(self, ids: Tensor) -> ModelHead:
        """A head of these tokens' rows, a copy: its logits are of shape (rows, len(ids))."""
        made, ids = copy.copy(self), ids.to(self.device)
        made._weight = self._weight.detach()[ids]
        made._bias = None if self._bias is None else self._bias.detach()[ids]
        made.output = nn.Linear(
            made._weight.shape[1], len(ids), made._bias is not None, device="meta"
        )
        made.output.weight = nn.Parameter(made._weight, requires_grad=False)
        if made._bias is not None:
            made.output.bias = nn.Parameter(made._bias, requires_grad=False)
        return made

    def of(self, ids: Tensor, normed: Tensor) -> Tensor:
        """Logits of these tokens alone, shape (rows, len(ids))."""
        bias = None if self._bias is None else self._bias[ids]
        return self._shaped(functional.linear(normed, self._weight[ids], bias))

    @property
    def n_tokens(self) -> int:
        return int(self._weight.shape[0])

    def normed(self, states: Tensor) -> Tensor:
        made: Tensor = self._norm(states)
        return made

    def normed_nearby(self, states: Tensor) -> Tensor:
        """The same; on the host where they are few."""
        if states.numel() > ON_HOST:
            return self.normed(states)
        made: Tensor = self._host_norm(states.cpu())
        return made

    def rows(self, answers: Tensor) -> AnswerRows:
        """Of `answers`, shape (rows, most). Those that were asked for last are still there."""
        listed = tuple(map(tuple, answers.tolist()))
        known = listed[:1] if len(set(listed)) == 1 else listed
        if self._rows is None or known != self._known:
            self._known, self._rows = known, self._rows_of(torch.tensor(known))
        return self._rows

    def _rows_of(self, answers: Tensor) -> AnswerRows:
        absent = answers == NOT_ONE
        ids = answers.clamp(min=0).to(self.device)
        bias = None if self._bias is None else _host(self._bias[ids])
        return _host(self._weight[ids]), bias, absent if bool(absent.any()) else None

    def answer_logits(self, normed: Tensor, rows: AnswerRows) -> Tensor:
        """Logits of each row's own answers, shape (rows, most), float32 on the host; -inf where it
        has none."""
        (weight, bias, absent), normed = rows, _host(normed)
        if len(weight) == 1:
            logits = functional.linear(normed, weight[0], None if bias is None else bias[0])
        else:
            logits = torch.einsum("rd,rad->ra", normed, weight)
            logits = logits if bias is None else logits + bias
        logits = self._shaped(logits)
        return logits if absent is None else logits.masked_fill(absent, -torch.inf)

    def logits(self, normed: Tensor) -> Tensor:
        return self._shaped(self.output(normed))

    def _shaped(self, logits: Tensor) -> Tensor:
        logits = logits.float() * self._scale if self._scale != 1 else logits.float()
        return (logits / self._cap).tanh() * self._cap if self._cap else logits


class Checks:
    """The arrays of a rule, and the model's head."""

    def __init__(self, rule: Rule, head: ModelHead) -> None:
        self.rule, self.head = rule, head
        self.threshold = rule.threshold
        self._weights = _array(rule.weights)
        self._bias = _array(rule.bias)
        self._probes: list[tuple[Tensor, Tensor]] = []
        if rule.probe is not None and rule.probe_bias is not None:
            self._probes = list(zip(_array(rule.probe), _array(rule.probe_bias), strict=True))
        self._numbers = list(zip(rule.weights.tolist(), rule.bias.tolist(), strict=True))

    def decide(self, check: int, states: Tensor, rows: AnswerRows) -> list[tuple[float, int]]:
        """(score, number of the likeliest answer) of each of states (rows, width)."""
        if len(states) == 1 and self.rule.check in (ANSWERS, PROBE):
            return [self._of_one(check, states, rows)]
        found, chosen = self.of_answers(check, states, rows)
        return list(zip(found.tolist(), chosen.tolist(), strict=True))

    def _of_one(self, check: int, states: Tensor, rows: AnswerRows) -> tuple[float, int]:
        """As `of_answers`, with fewer calls than operations on tensors would be."""
        logits: list[float] = self._answer_logits(check, states, rows)[0].tolist()
        weights, bias = self._numbers[check]
        features = row_features(logits)
        score = sum(w * f for w, f in zip(weights, features, strict=True)) + bias
        return score, logits.index(max(logits))

    def of_answers(self, check: int, states: Tensor, rows: AnswerRows) -> tuple[Tensor, Tensor]:
        """(scores, numbers of the likeliest answers) of states (rows, width), both (rows,) and on
        the host."""
        logits, features = self.answer_features(check, states, rows)
        return self._scored(check, features), logits.argmax(-1)

    def answer_features(
        self, check: int, states: Tensor, rows: AnswerRows
    ) -> tuple[Tensor, Tensor]:
        """(logits (rows, answers), features (rows, n)) of states (rows, width), on the host."""
        if self.rule.check != VOCABULARY:
            logits = self._answer_logits(check, states, rows)
            return logits, probability_features(logits)
        normed = self.head.normed(states)
        seen = probability_features(self.head.logits(normed))
        copied = _host(torch.cat([seen, normed.float()], -1))  # one wait, not two
        seen, normed = copied[:, : seen.shape[1]], copied[:, seen.shape[1] :]
        return self.head.answer_logits(normed, rows), seen

    def _answer_logits(self, check: int, states: Tensor, rows: AnswerRows) -> Tensor:
        if self.rule.check == ANSWERS:
            return self.head.answer_logits(self.head.normed_nearby(states), rows)
        return functional.linear(unit(_host(states)), *self._probes[check])

    def _token_features(self, states: Tensor) -> Tensor:
        if self.rule.check == STATE:
            return unit(_host(states))
        return _host(probability_features(self.head.logits(self.head.normed(states))))

    def of_tokens(self, check: int, states: Tensor) -> Tensor:
        """Scores of states (rows, width) whose next token may be any, shape (rows,)."""
        return self._scored(check, self._token_features(states))

    def _scored(self, check: int, features: Tensor) -> Tensor:
        return scores(features, self._weights[check], self._bias[check])


FOR_TOKENS = (STATE, VOCABULARY)
"""Checks that need no list of answers."""


def _array(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _host(values: Tensor) -> Tensor:
    return values.cpu().float()  # copied as it is: a change of type would be a kernel


def padded_answers(answers: Sequence[Sequence[int]]) -> Tensor:
    """Ids of answers as a tensor (rows, most) on the host, filled up with NOT_ONE."""
    most = max(map(len, answers))
    return torch.tensor([[*row, *[NOT_ONE] * (most - len(row))] for row in answers])
