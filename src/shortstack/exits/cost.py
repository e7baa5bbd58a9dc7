"""What depth costs: a fixed part and one for each layer, fitted to two measured depths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shortstack.errors import ShortstackError


@dataclass(frozen=True)
class DepthCost:
    """Seconds of one operation: `fixed_s` (embedding, head, launches) and `per_layer_s`."""

    fixed_s: float
    per_layer_s: float

    @classmethod
    def through(cls, shallow: tuple[int, float], deep: tuple[int, float]) -> DepthCost:
        """The line through two measurements, (layers, seconds); never falling with depth."""
        (few, short_s), (many, long_s) = shallow, deep
        if few == many:  # an exit behind all layers but one runs as many as the whole model
            return cls(long_s, 0.0)
        slope = max(0.0, (long_s - short_s) / (many - few))
        return cls(max(0.0, long_s - slope * many), slope)

    def at(self, layers: int) -> float:
        return self.fixed_s + self.per_layer_s * layers


@dataclass(frozen=True)
class RequestCost:
    """A request: its prompt in one pass, then a step for each new token but the first, which the
    prompt gives."""

    prompt_tokens: int
    prefill: DepthCost
    step: DepthCost

    def seconds(self, layers: int, new_tokens: int) -> float:
        return self.prefill.at(layers) + (new_tokens - 1) * self.step.at(layers)


def deepest_within(
    max_latency_ms: float, layers_at: Mapping[int, int], cost: RequestCost, new_tokens: int
) -> int:
    """The deepest depth whose request keeps to a budget; `layers_at`: depth -> layers that run.

    Raises ShortstackError where none does, with the least that is possible, and for a budget that
    is no number.
    """
    if not math.isfinite(max_latency_ms):
        raise ShortstackError(f"{max_latency_ms} ms is no budget. Give a number, e.g. 400.")
    spent_ms = {
        depth: 1e3 * cost.seconds(layers, new_tokens) for depth, layers in layers_at.items()
    }
    fitting = [depth for depth, spent in spent_ms.items() if spent <= max_latency_ms]
    if not fitting:
        least = min(spent_ms, key=lambda depth: (spent_ms[depth], depth))
        raise ShortstackError(
            f"no depth keeps to {max_latency_ms:g} ms: the least is {spent_ms[least]:,.1f} ms at "
            f"depth {least}, for {cost.prompt_tokens} + {new_tokens} tokens. Allow that much, or "
            "ask for fewer tokens."
        )
    return max(fitting, key=lambda depth: (layers_at[depth], depth))  # the whole model on a tie
