"""What healing is asked to do; checked before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from shortstack.errors import SettingError, ShortstackError, unknown

LOSSES = ("kl", "ce", "mix", "mse")
TRAINED = ("all", "lora:RANK", "layers:3,4", "neighbours")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu")
Loss = Literal["kl", "ce", "mix", "mse"]


@dataclass(frozen=True)
class HealSettings:
    """One healing run.

    `tokens` is the budget of tokens the student sees (0: it is only measured); `batch_windows` the
    windows of one step over all processes, so that their number does not change the result.

    `loss`: `kl` forward KL(teacher || student); `ce` the next token; `mix` alpha * kl +
    (1 - alpha) * ce; `mse` hidden states: the student's layer `replaces[0]` is to do what the
    teacher's layers `replaces[0]` to `replaces[1]` (counted in) do. `top_k`: how many of the
    teacher's logits count one by one, the rest as one sum; None for all.

    `train`: `all`, `lora:RANK`, `layers:3,4` (numbers in the student) or `neighbours` (the layers
    on either side of a cut). `warmup` is a share of the steps; then the rate falls as a cosine to
    `final_rate` times `learning_rate`. `micro_windows`: windows a process runs at once (None:
    chosen for the device); halved once when memory is out. `eval_steps`: None for about a tenth of
    the run; `save_steps`: None for one state every two minutes.

    `keep_float32` stores what was trained in float32, not in the type it had. `dtype` is that of
    products (weights and their updates are float32): `auto` is bfloat16 on a GPU, and on a CPU
    that multiplies it in hardware.
    """

    tokens: int
    window_tokens: int = 512
    batch_windows: int = 16
    micro_windows: int | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.05
    final_rate: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    loss: Loss = "kl"
    alpha: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    train: str = "all"
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    replaces: tuple[int, int] | None = None
    keep_float32: bool = False
    eval_steps: int | None = None
    save_steps: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.device not in DEVICES:
            raise unknown("device", self.device, DEVICES)
        if not re.fullmatch(r"all|neighbours|lora:[1-9]\d{0,3}|layers:\d+(,\d+)*", self.train):
            raise unknown("choice of what to train", self.train, TRAINED)
        if (self.loss == "mse") != (self.replaces is not None):
            raise ShortstackError(
                "loss 'mse' compares hidden states across replaced layers: it is what "
                "shortstack streamline trains with. Choose kl, ce or mix."
            )
        self._check_numbers()

    @property
    def runs_teacher(self) -> bool:
        return self.loss != "ce"

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch_windows * self.window_tokens))

    @property
    def lora_rank(self) -> int | None:
        kind, _, rank = self.train.partition(":")
        return int(rank) if kind == "lora" else None

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then half a cosine."""
        warm = min(self.steps, math.ceil(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        at = (step - warm) / max(1, self.steps - warm)
        share = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * at))
        return self.learning_rate * share

    def _check_numbers(self) -> None:
        least = {
            **{"tokens": 0, "window_tokens": 8, "batch_windows": 1, "micro_windows": 1},
            **{"top_k": 1, "eval_steps": 1, "save_steps": 1},
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise SettingError(name, f"is {value}, at least {bound} is needed.")
        for name in ("learning_rate", "temperature", "grad_clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise SettingError(name, f"is {value}; it must be a number above 0.")
        for name in ("warmup", "final_rate", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(name, f"is {getattr(self, name)}; it must lie in 0 to 1.")
