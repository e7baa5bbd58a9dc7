"""What a repair does to the hidden state at a boundary, before it is folded into weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shortstack.prune.repair.statistics import normed


@dataclass(frozen=True)
class Shift:
    """X + b; b has shape (width,)."""

    bias: Tensor

    def apply(self, hidden: Tensor, mlp: Tensor | None) -> Tensor:
        return hidden + self.bias.float()


@dataclass(frozen=True)
class Scale:
    """alpha X."""

    factor: float

    def apply(self, hidden: Tensor, mlp: Tensor | None) -> Tensor:
        return hidden * self.factor


@dataclass(frozen=True)
class MapOutput:
    """Y + M T = X + M D with T = I + D, of shape (width, width): rows are tokens. Granite adds r M
    to the stream, so that there T = I + D / r."""

    change: Tensor

    def apply(self, hidden: Tensor, mlp: Tensor | None) -> Tensor:
        assert mlp is not None
        return hidden + mlp @ self.change.float()


@dataclass(frozen=True)
class Slot:
    """X + RMSNorm(X) W + c, with the norm's weight 1; W is (width, width), rows are tokens."""

    matrix: Tensor
    constant: Tensor
    epsilon: float

    def apply(self, hidden: Tensor, mlp: Tensor | None) -> Tensor:
        return hidden + normed(hidden, self.epsilon) @ self.matrix.float() + self.constant.float()


@dataclass(frozen=True)
class OwnMlp:
    """X + A D + c, A = silu(G n) * (U n), n = RMSNorm(X): the MLP of the dropped layer `layer`
    with another down projection, D of shape (MLP width, width), and its own bias c.

    `activate` computes A from X; None once the map has only to be written.
    """

    layer: int
    down: Tensor
    constant: Tensor | None = None
    activate: Callable[[Tensor], Tensor] | None = None

    def apply(self, hidden: Tensor, mlp: Tensor | None) -> Tensor:
        assert self.activate is not None
        made = hidden + self.activate(hidden).float() @ self.down.float()
        return made if self.constant is None else made + self.constant.float()


Map = Shift | Scale | MapOutput | Slot | OwnMlp
