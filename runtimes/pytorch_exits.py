"""transformers on a model with exits: the depth is chosen for each request.

A request is a prefill and what follows it: its depth is that in force at the prefill, so that its
cache has no holes. The layers of the base and each exit's own have slots of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from shortstack.errors import ShortstackError
from shortstack.exits.cost import DepthCost, RequestCost, deepest_within
from shortstack.exits.folder import ExitFolder, read_exits
from shortstack.runtimes.pytorch import PyTorchSession

REPEATS, STEPS = 3, 8
"""Of each measured depth: timed prompts, and steps behind each."""


class ExitsSession(PyTorchSession):
    """A folder of exits, or a model's that holds them, open with its base.

    `depth`: at which requests run until another is asked for; None is the whole model, whose
    numbers are those of a session without exits.
    """

    def __init__(
        self, path: Path, *, depth: int | None = None, model: Path | None = None, **more: Any
    ) -> None:
        self._folder: ExitFolder = read_exits(path, model)
        self._depth = self._folder.n_layers if depth is None else depth
        self._folder.check_depth(self._depth)
        self._costs: dict[int, RequestCost] = {}
        super().__init__(self._folder.base, loader=self._open, **more)
        self._show_depth()

    def _open(self, path: Path, *, dtype: str, device: Any) -> tuple[Any, dict[str, Any]]:
        from shortstack.exits.model import open_exits

        kind = getattr(self._torch, dtype)
        self._exits = open_exits(self._folder, dtype=kind, device=device)
        return self._exits.at(self._depth), {"depths": list(self._folder.depths)}

    @property
    def depth(self) -> int:
        return self._depth

    @depth.setter
    def depth(self, depth: int) -> None:
        """Of the requests that follow: the next prefill begins one. Raises ShortstackError for a
        depth that is not there."""
        self._folder.check_depth(depth)
        self._depth = depth
        self._cache = None  # decode without a prefill would mix depths
        self._model = self._exits.at(depth)
        self._show_depth()

    def choose(self, max_latency_ms: float, *, prompt_tokens: int, new_tokens: int = 1) -> int:
        """Set and return the deepest depth at which a request of this size takes no longer than
        `max_latency_ms`, by what layers cost here.

        The cost is measured at the first need for prompts of about this length (a power of 2), at
        the least and the greatest depth. Raises ShortstackError where no depth is fast enough, and
        for a request beyond the session's context.
        """
        check_request(prompt_tokens, new_tokens, self._context_tokens, "the session's")
        layers_at = {depth: self._folder.layers_at(depth) for depth in self._folder.depths}
        cost = self.cost(prompt_tokens)
        self.depth = deepest_within(max_latency_ms, layers_at, cost, new_tokens)
        return self.depth

    def cost(self, prompt_tokens: int) -> RequestCost:
        """What a prompt and a step behind it cost; any request that is open is lost."""
        length = 1 << (prompt_tokens - 1).bit_length()
        length = max(1, min(length, self._context_tokens - STEPS))
        if length not in self._costs:
            self._costs[length] = self._measured(length)
        measured, share = self._costs[length], prompt_tokens / length
        prefill = measured.prefill
        scaled = DepthCost(prefill.fixed_s * share, prefill.per_layer_s * share)
        return RequestCost(prompt_tokens, scaled, measured.step)

    def _measured(self, length: int) -> RequestCost:
        before, depths = self._depth, self._folder.depths
        found: list[tuple[int, float, float]] = []
        for depth in (depths[0], depths[-1]):
            self.depth = depth
            self._timed_request(length)  # the first run of a depth sets things up
            runs = [self._timed_request(length) for _ in range(REPEATS)]
            prompt_s = median(prompt for prompt, _ in runs)
            step_s = median(step for _, steps in runs for step in steps)
            found.append((self._folder.layers_at(depth), prompt_s, step_s))
        self.depth = before
        (few, short_s, short_step_s), (many, long_s, long_step_s) = found
        return RequestCost(
            length,
            DepthCost.through((few, short_s), (many, long_s)),
            DepthCost.through((few, short_step_s), (many, long_step_s)),
        )

    def _timed_request(self, length: int) -> tuple[float, list[float]]:
        """Seconds of a prompt and of steps behind it; what the tokens are does not matter."""
        tokens = (np.arange(length) % self.vocab_size).tolist()
        return _seconds(lambda: self.prefill(tokens)), [
            _seconds(lambda: self.decode(0)) for _ in range(STEPS)
        ]

    def _empty_cache(self) -> None:
        self._cache = self._exits.new_slots().at(self._depth)

    def _show_depth(self) -> None:
        self._info |= {"depth": self._depth, "layers": self._folder.layers_at(self._depth)}


def check_request(prompt_tokens: int, new_tokens: int, context: int | None, whose: str) -> None:
    """Raise ShortstackError for a request of no tokens, and for one that a context has no room for;
    None has room for all."""
    if min(prompt_tokens, new_tokens) < 1:
        raise ShortstackError(
            f"a request is a prompt and at least one new token, {prompt_tokens} and {new_tokens} "
            "were asked for. Ask for one of each at least."
        )
    if context is not None and prompt_tokens + new_tokens > context:
        raise ShortstackError(
            f"a prompt of {prompt_tokens} and {new_tokens} new tokens are "
            f"{prompt_tokens + new_tokens}, {whose} context is {context} tokens. Ask for less."
        )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()  # its logits come to the host, which waits for the device
    return time.perf_counter() - start
