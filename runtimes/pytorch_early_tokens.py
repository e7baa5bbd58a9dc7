"""Generation that leaves a model early, token by token, with the cache filled behind the exit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.early_exit.checks import FOR_TOKENS, Checks, ModelHead
from shortstack.early_exit.rule import Rule
from shortstack.early_exit.rule_file import check_model
from shortstack.early_exit.watched import Run, fill_cache, watched
from shortstack.errors import ShortstackError, unknown
from shortstack.runtimes.pytorch import PyTorchSession

FILLS = ("state", "zeros", "none")
"""What layers behind an exit keep of the token: keys and values of the state that it left with
(CALM, arXiv:2207.07061); zeros; nothing. The last two are there to show what they do."""


class EarlyTokenSession(PyTorchSession):
    """A PyTorchSession whose decode steps leave at the first check that holds.

    Prompts run through all layers. `layers_run` and `steps` count what decode steps did. Raises
    ShortstackError for a rule that was fitted to another model.
    """

    def __init__(self, path: Path, rule: Rule, *, fill: str = "state", **more: Any) -> None:
        if fill not in FILLS:
            raise unknown("fill of an early exit", fill, FILLS)
        if rule.check not in FOR_TOKENS:
            raise ShortstackError(
                f"an early exit with the check {rule.check!r} is for questions. Fit one on text."
            )
        check_model(rule, Checkpoint.open(path).sha256, str(path))
        super().__init__(path, **more)
        self._n_layers = len(self._model.get_decoder().layers)
        if rule.layers[-1] >= self._n_layers:
            raise ShortstackError(
                f"the early exit checks after {rule.layers[-1]} layers, the model has "
                f"{self._n_layers}. Fit one to this model."
            )
        self._checks = Checks(rule, ModelHead(self._model))
        self._fill = fill
        self._left = False
        self.layers_run = self.steps = 0
        self._info |= {"early_exit": list(rule.layers), "fill": fill}

    def reset_counts(self) -> None:
        self.layers_run = self.steps = 0

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        return None  # without a fill, layers hold different numbers of tokens

    def decode(self, token: int) -> NDArray[np.float32]:
        self._left = False
        self.steps += 1
        with watched(self._model, self._on_layer):
            return super().decode(token)

    def _on_layer(self, index: int, run: Run, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        if self._left:
            if self._fill != "none":
                fill_cache(run, hidden, named, zeros=self._fill == "zeros")
            return hidden
        self.layers_run += 1
        hidden = run(hidden, **named)
        check = self._checks.rule.at(index + 1)
        if check is not None:
            score = self._checks.of_tokens(check, hidden[:, -1])
            self._left = bool(score >= self._checks.threshold)
        return hidden
