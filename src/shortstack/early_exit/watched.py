"""The layers of a transformers model, each call of them in our hands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shortstack.pretrained import layers_return_tuples

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[..., "Tensor"]
"""A layer as it is: (hidden, **what the decoder gives it) -> hidden."""

OnLayer = Callable[[int, Run, "Tensor", dict[str, Any]], "Tensor"]
"""Told the layer's number, the layer, hidden states of shape (rows, length, width) and what the
decoder gives the layer by name; returns the hidden states for the next layer."""


@contextlib.contextmanager
def watched(model: Any, on_layer: OnLayer) -> Iterator[None]:
    """Let `on_layer` decide, while the block runs, what each layer of `model` does.

    The model itself embeds, makes masks and rotations and applies the last norm, as its family
    does; nothing of the family has to be known here.
    """
    in_tuple = layers_return_tuples(model.config)
    layers = list(model.get_decoder().layers)
    try:
        for index, layer in enumerate(layers):
            # an attribute of the instance shadows the method of the class
            layer.forward = _deciding(index, layer.forward, on_layer, in_tuple)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _deciding(
    index: int, original: Callable[..., Any], on_layer: OnLayer, in_tuple: bool
) -> Callable[..., Any]:
    def run(hidden: Tensor, **named: Any) -> Tensor:
        made = original(hidden, **named)
        result: Tensor = made[0] if isinstance(made, tuple) else made
        return result

    def forward(hidden: Tensor, **named: Any) -> Any:
        made = on_layer(index, run, hidden, named)
        return (made,) if in_tuple else made

    return forward


class _FilledError(Exception):
    """The keys and values are in the cache: the rest of the layer is not wanted."""


class _OnlyKeys:
    """A cache that takes what one layer gives it and then ends that layer."""

    def __init__(self, cache: Any, zeros: bool) -> None:
        self._cache, self._zeros = cache, zeros

    def update(self, keys: Tensor, values: Tensor, *args: Any, **named: Any) -> Any:
        if self._zeros:
            keys, values = keys * 0, values * 0
        self._cache.update(keys, values, *args, **named)
        raise _FilledError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def fill_cache(run: Run, hidden: Tensor, named: dict[str, Any], *, zeros: bool = False) -> None:
    """Put a layer's keys and values of `hidden` into the cache, without attention and MLP.

    For a token that left before this layer: CALM's propagation of the state it left with (Schuster
    et al. 2022, arXiv:2207.07061, section 3.2). What comes after the projections of the layer is
    not computed, whatever the family. `zeros` keeps zeros in their place.
    """
    cache = _OnlyKeys(named["past_key_values"], zeros)
    with contextlib.suppress(_FilledError):
        run(hidden, **{**named, "past_key_values": cache})
