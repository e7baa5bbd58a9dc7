"""A transformers model whose sub-blocks can be called alone, and taken out while it lives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shortstack.pretrained import layers_return_tuples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["attention", "mlp", "block"]
MODULES = {"attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True, order=True)
class Unit:
    """What goes in one piece: the attention or the MLP of a layer, or the whole block."""

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"


def parse_unit(text: str) -> Unit:
    """Read what `str` wrote."""
    layer, _, kind = text.partition(".")
    return Unit(int(layer), kind)  # type: ignore[arg-type]  # only ever our own words


def units_of(n_layers: int, unit: str) -> tuple[Unit, ...]:
    """All units of a model, in the order of computation; `unit` is `sub-block` or `block`."""
    kinds: tuple[Kind, ...] = ("block",) if unit == "block" else ("attention", "mlp")
    return tuple(Unit(index, kind) for index in range(n_layers) for kind in kinds)


class _Gate:
    """Stands in for a module's forward; closed, the module adds nothing and computes nothing."""

    def __init__(self, module: Any, *, in_pair: bool) -> None:
        self._forward, self._in_pair, self.closed = module.forward, in_pair, False
        module.forward = self  # shadows the method of the class for this one module

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not self.closed:
            return self._forward(*args, **named)
        import torch

        zero = torch.zeros_like(args[0] if args else named["hidden_states"])
        return (zero, None) if self._in_pair else zero


class _Passage:
    """Stands in for a layer's forward; open, the hidden states pass through unchanged."""

    def __init__(self, layer: Any, *, in_tuple: bool) -> None:
        self._forward, self._in_tuple, self.open = layer.forward, in_tuple, False
        layer.forward = self

    def __call__(self, hidden: Any, **named: Any) -> Any:
        if not self.open:
            return self._forward(hidden, **named)
        return (hidden,) if self._in_tuple else hidden


class TrimModel:
    """A loaded causal language model, its units and which of them are gone.

    Rows are padded on the right and causal, so that padding needs no mask. On CUDA everything runs
    under bfloat16 autocast with float32 weights.
    """

    def __init__(self, model: Any, unit: str) -> None:
        self.hf = model.eval()  # no dropout: a resumed run must give the same numbers
        self.decoder = model.get_decoder()
        self.layers = list(self.decoder.layers)
        self._in_tuple = layers_return_tuples(model.config)
        self._gates = [
            {
                "attention": _Gate(layer.self_attn, in_pair=True),
                "mlp": _Gate(layer.mlp, in_pair=False),
            }
            for layer in self.layers
        ]
        self._passages = [_Passage(layer, in_tuple=self._in_tuple) for layer in self.layers]
        self.all_units = units_of(len(self.layers), unit)
        self.gone: frozenset[Unit] = frozenset()
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.hf.device
        return device

    @property
    def units(self) -> tuple[Unit, ...]:
        """What is left, in the order of computation."""
        return tuple(unit for unit in self.all_units if unit not in self.gone)

    def take_out(self, gone: Iterable[Unit]) -> None:
        """Make exactly the units of `gone` absent."""
        self.gone = frozenset(gone)
        for index, gates in enumerate(self._gates):
            for kind, gate in gates.items():
                gate.closed = Unit(index, kind) in self.gone  # type: ignore[arg-type]
            self._passages[index].open = Unit(index, "block") in self.gone or all(
                gate.closed for gate in gates.values()
            )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", torch.bfloat16)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before layer 0, (rows, length, width), of ids (rows, length)."""
        length = tokens.shape[1]
        if length not in self._arguments:
            # Of one row: masks and rotations that hold for every row, so that any number fits.
            self._arguments[length] = self._record(tokens[:1])[1]
        return self._record(tokens)[0]

    def call(self, unit: Unit, hidden: Tensor) -> Tensor:
        """Hidden states after `unit` alone, same shape as `hidden`: residual plus its result."""
        arguments = self._arguments[hidden.shape[1]][unit.layer]
        with self._alone(unit):
            output = self.layers[unit.layer](hidden, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def finish(self, hidden: Tensor) -> Tensor:
        """Logits (positions, vocabulary), float32, of hidden states (positions, width)."""
        return self.head(self.decoder.norm(hidden))

    def head(self, normed: Tensor) -> Tensor:
        """Logits of hidden states behind the final norm, as the family scales and caps them."""
        config = self.hf.config.get_text_config()
        logits: Tensor = self.hf.get_output_embeddings()(normed).float()
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return (logits / cap).tanh() * cap if cap else logits

    def parameters_of(self, unit: Unit) -> dict[str, Any]:
        """The unit's parameters by their name in the checkpoint; norms are no sub-block's."""
        prefix = self._prefix + f"{unit.layer}."
        inner = "" if unit.kind == "block" else MODULES[unit.kind] + "."
        return {
            name: parameter
            for name, parameter in self.hf.named_parameters()
            if name.startswith(prefix + inner)
        }

    @property
    def _prefix(self) -> str:
        """`model.layers.`, whatever the class calls its decoder."""
        first = self.layers[0]
        name: str = next(name for name, module in self.hf.named_modules() if module is first)
        return name.removesuffix("0")

    @contextlib.contextmanager
    def _alone(self, unit: Unit) -> Iterator[None]:
        """Close the other half of the unit's layer for one call."""
        if unit.kind == "block":
            yield
            return
        other = self._gates[unit.layer]["mlp" if unit.kind == "attention" else "attention"]
        before, other.closed = other.closed, True
        try:
            yield
        finally:
            other.closed = before

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Run the decoder with layers that only note what they were called with."""
        first: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def note(hidden: Tensor, **named: Any) -> Any:
            first.append(hidden)
            arguments.append(named)
            return (hidden,) if self._in_tuple else hidden

        before = [layer.forward for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = note
            self.decoder(input_ids=tokens, use_cache=False)
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                layer.forward = forward
        return first[0], arguments
