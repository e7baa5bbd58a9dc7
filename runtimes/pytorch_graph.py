"""Decode steps of transformers through one captured CUDA graph: a step costs one launch.

Prompts run as in the plain session. Steps of one token run over a cache of fixed size, of which a
mask hides what is not filled yet: they read all of it, so `context_tokens` sets what a step costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from shortstack.errors import ShortstackError, one_line
from shortstack.pretrained import OLDER
from shortstack.runtimes.pytorch import PyTorchSession

ALIGNMENT = 16
"""Slots come in multiples of it: attention kernels copy a mask whose rows are not aligned."""
ATTENTION = frozenset({"full_attention", "sliding_attention"})
"""Words of `layer_types` for layers whose state is keys and values alone."""
WARMUP_STEPS = 3
"""Before the capture, as PyTorch's notes on CUDA graphs ask for: libraries set themselves up."""


@dataclass
class Place:
    """Where the next keys go: shared by all layers and the step."""

    filled: int = 0
    """Slots in use, for prompts: known to the host."""
    in_step: bool = False
    """Whether what runs is the step, which must not depend on `filled`: a graph keeps numbers."""
    position: Any = None
    """The same for the step: a tensor, shape (1,), int64, on the device."""


class SlotLayer(StaticLayer):
    """Keys and values of one layer in buffers of shape (batch, heads, slots, width).

    A prompt sees what is filled alone, as in a DynamicCache; the step sees all slots.
    """

    is_compileable = False
    """Else transformers gives prompts a mask, which keeps flash attention away."""

    def __init__(self, slots: int, place: Place) -> None:
        super().__init__(slots)
        self._slots = slots
        self._place = place

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self._allocate(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if self._place.in_step:
            keys.index_copy_(2, self._place.position, key_states)
            values.index_copy_(2, self._place.position, value_states)
            return keys, values
        start, end = self._place.filled, self._place.filled + key_states.shape[-2]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Zeros, not what memory held: a hidden value counts 0 times, and 0 times NaN is NaN."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = (
            torch.zeros(
                (*one.shape[:2], self._slots, one.shape[-1]), dtype=one.dtype, device=one.device
            )
            for one in (keys, values)
        )
        self.is_initialized = True

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, first key); transformers 4.57 gives positions where 5 gives their number."""
        n = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self._place.filled + n, 0

    def get_seq_length(self, *args: Any) -> int:
        return self._place.filled


class GraphSession(PyTorchSession):
    """A PyTorchSession whose steps of one token a sequence are one replay each.

    The graph is captured while the session opens. `capture=False` runs the very same step without
    one, on any device: what tests on the CPU hold against the plain session.
    """

    STEPS_OF_ONE_SHAPE = True

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int,
        batch: int = 1,
        capture: bool = True,
        **more: Any,
    ) -> None:
        super().__init__(path, context_tokens=context_tokens, batch=batch, **more)
        slots = -(-context_tokens // ALIGNMENT) * ALIGNMENT
        _check_model(self._model, context_tokens)
        self._batch = batch
        self._place = Place(position=torch.zeros(1, dtype=torch.long, device=self._device))
        self._cache = self._new_cache(slots)
        self._ids = torch.zeros((batch, 1), dtype=torch.long, device=self._device)
        self._slot_numbers = torch.arange(slots, device=self._device)
        self._last: NDArray[np.float32] | None = None
        self._started = False
        self._step: Callable[[], Any] = (
            captured(self._one_step, self._device) if capture else self._one_step
        )
        self._info |= {"cuda_graph": "on" if capture else "off", "kv_slots": slots}

    def _new_cache(self, slots: int) -> Cache:
        like = StaticCache(config=self._model.config.get_text_config(), max_cache_len=slots)
        return Cache(layers=[SlotLayer(slots, self._place) for _ in like.layers])

    def _one_step(self) -> torch.Tensor:
        """Logits, shape (batch, vocab), float32, of `_ids` at `_place.position`.

        Reads and writes fixed memory only and asks the device nothing, so it can be captured. A
        mask of four dimensions is one that transformers takes as it is: 0, or the least number for
        slots behind the position.
        """
        position, model = self._place.position, self._model
        least = torch.finfo(model.dtype).min
        shape = (self._batch, 1, 1, len(self._slot_numbers))
        mask = torch.zeros(shape, dtype=model.dtype, device=self._device)
        mask.masked_fill_(self._slot_numbers > position, least)
        older = transformers.__version__.startswith(OLDER)
        self._place.in_step = True
        try:
            with torch.inference_mode():
                result = model(
                    input_ids=self._ids,
                    attention_mask=mask,
                    position_ids=position.expand(self._batch, 1),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **({"cache_position": position} if older else {}),
                )
                logits: torch.Tensor = result.logits[:, -1].float()
        finally:
            self._place.in_step = False
        return logits

    def _forward(self, rows: Sequence[Sequence[int]], keep: int) -> NDArray[np.float32]:
        self._started = True
        n, behind = len(rows[0]), self._place.filled > 0
        if len(rows) != self._batch:
            raise ShortstackError(
                f"this session was opened for {self._batch} sequences, {len(rows)} are given. "
                "Open it for as many as there are."
            )
        if n == 1 and behind and keep == 1:
            self._last = self._replayed(rows)
        else:
            self._last = super()._forward(rows, keep)
        self._place.filled += n
        return self._last

    def _replayed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self._check_room(1)
        with torch.inference_mode():
            self._ids.copy_(torch.tensor([list(row) for row in rows]))
            self._place.position.fill_(self._place.filled)
            logits = self._step()
        made: NDArray[np.float32] = logits.cpu().numpy()
        return made[:, None]

    def _empty_cache(self) -> None:
        self._go_back(0)

    def decode(self, token: int) -> NDArray[np.float32]:
        if not self._started:
            raise ShortstackError("decode needs a prefill before it.")
        return super().decode(token)

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        if not self._started:
            return None
        self._go_back(keep)
        # one token is a step, replayed as in decoding: energy is counted over turns that begin so
        return np.asarray(self._forward([tokens], keep=1 if len(tokens) == 1 else 0)[0])

    def resume_rows(self, keep: int, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        if not self._started:
            return None
        self._go_back(keep)
        return self.extend_rows(rows)

    def _go_back(self, keep: int) -> None:
        """Forget all but `keep` tokens. Buffers stay as they are, unless what they hold is no
        number: the mask would not hide that."""
        if self._last is not None and not np.isfinite(self._last[:, -1]).all():
            with torch.inference_mode():
                for layer in filter(lambda one: one.is_initialized, self._cache.layers):
                    layer.keys[:, :, keep:].zero_()
                    layer.values[:, :, keep:].zero_()
        self._place.filled = keep

    def close(self) -> None:
        self._step = self._one_step  # the graph holds memory of the card
        super().close()


def captured(step: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """What replays `step`, captured after some runs of it; returns the same tensor each time.

    Raises ShortstackError where the model does what no graph can hold, such as asking the device.
    """
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread that watches memory meanwhile is no fault of the capture
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                logits = step()
            torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = error.__context__ or error  # ending the capture fails after what broke it
        raise ShortstackError(
            f"this model cannot be captured in a CUDA graph: {one_line(str(first), 200)} "
            "Leave out cuda_graph=on."
        ) from None

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def _check_model(model: Any, context_tokens: int) -> None:
    """Raise ShortstackError for what the step would compute wrong or could not hold."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if others:
        raise ShortstackError(
            f"cuda_graph=on is for layers of attention alone, {config.model_type} has others: "
            f"{', '.join(sorted(others))}. Leave it out."
        )
    layers: list[Any] = StaticCache(config=config, max_cache_len=context_tokens + 1).layers
    for layer in layers:
        if layer.is_sliding and layer.max_cache_len < context_tokens:
            raise ShortstackError(
                f"cuda_graph=on has no sliding windows: {config.model_type} sees "
                f"{layer.max_cache_len:,} tokens back, the context is {context_tokens:,}. Ask for "
                "fewer tokens, or leave it out."
            )
    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if "dynamic" in kind or kind == "longrope":
                raise ShortstackError(
                    f"cuda_graph=on takes no rotation that changes with the length ({kind}). "
                    "Leave it out."
                )
