"""A rule at work: of hidden states at one depth, who leaves, and with what answer.

The decision has to be on the host, so that the copy of the states is the check's one wait for the
device; what follows is too little work to be worth launching kernels for. The whole head is not.
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
from shortstack.early_exit.rule import ANSWERS, PROBE, STATE, VOCABULARY, Rule

NOT_ONE = -1
"""Fills up rows of answers that have fewer than others."""


class ModelHead:
    """The last norm and the head of a transformers model, whole or by rows."""

    def __init__(self, model: Any) -> None:
        self._norm = model.get_decoder().norm
        output, config = model.get_output_embeddings(), model.config.get_text_config()
        self.output: nn.Module = output
        self._weight, self._bias = output.weight, output.bias
        self._scale = 1 / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.device, self.dtype = output.weight.device, output.weight.dtype

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

    def rows(self, answers: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weights, biases and absence of `answers`, shape (rows, most), float32 on the host; one
        row for all rows where they are alike."""
        answers = answers.cpu()
        if bool((answers == answers[:1]).all()):
            answers = answers[:1]
        absent = answers == NOT_ONE
        ids = answers.clamp(min=0).to(self.device)
        bias = None if self._bias is None else _host(self._bias[ids])
        return _host(self._weight[ids]), bias, absent

    def answer_logits(self, normed: Tensor, rows: tuple[Tensor, Tensor | None, Tensor]) -> Tensor:
        """Logits of each row's own answers, shape (rows, most), float32 on the host; -inf where it
        has none."""
        (weight, bias, absent), normed = rows, _host(normed)
        if len(weight) == 1:
            logits = functional.linear(normed, weight[0], None if bias is None else bias[0])
        else:
            logits = torch.einsum("rd,rad->ra", normed, weight)
            logits = logits if bias is None else logits + bias
        return self._shaped(logits).masked_fill(absent, -torch.inf)

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
        self._probe = None if rule.probe is None else _array(rule.probe)
        self._probe_bias = None if rule.probe_bias is None else _array(rule.probe_bias)

    def of_answers(
        self, check: int, states: Tensor, rows: tuple[Tensor, Tensor | None, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(scores, numbers of the likeliest answers) of states (rows, width), both (rows,) and on
        the host."""
        logits, features = self.answer_features(check, states, rows)
        return self._scored(check, features), logits.argmax(-1)

    def answer_features(
        self, check: int, states: Tensor, rows: tuple[Tensor, Tensor | None, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.rule.check == PROBE:
            assert self._probe is not None
            assert self._probe_bias is not None
            logits = functional.linear(
                unit(_host(states)), self._probe[check], self._probe_bias[check]
            )
            return logits, probability_features(logits)
        normed = self.head.normed(states)
        logits = self.head.answer_logits(normed, rows)
        if self.rule.check == ANSWERS:
            return logits, probability_features(logits)
        return logits, self._token_features(states, normed)

    def _token_features(self, states: Tensor, normed: Tensor | None = None) -> Tensor:
        if self.rule.check == STATE:
            return unit(_host(states))
        normed = self.head.normed(states) if normed is None else normed
        return _host(probability_features(self.head.logits(normed)))

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
    return values.float().cpu()


def padded_answers(answers: Sequence[Sequence[int]], device: Any) -> Tensor:
    """Ids of answers as a tensor (rows, most), filled up with NOT_ONE."""
    most = max(map(len, answers))
    filled = [[*row, *[NOT_ONE] * (most - len(row))] for row in answers]
    return torch.tensor(filled, device=device)
