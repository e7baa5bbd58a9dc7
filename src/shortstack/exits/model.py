"""A model and its exits in memory: every depth an ordinary causal model on the same tensors.

`at(k)` is a model of transformers whose decoder has the base's first k layers and the exit's own,
whose norm is the exit's; all but the exit's tensors are those of the base, not copies. So masks,
rotations and what a family does to embeddings and logits are transformers' at every depth, and the
whole model is the one that was opened: its numbers are bit for bit those without exits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortstack.checkpoint import Checkpoint
from shortstack.exits.folder import ExitFolder, read_exits
from shortstack.pretrained import load


class Exits:
    """The base model and its exits, on one device in one type.

    `layers` and `norms` are modules by exit; `layers` is empty where exits have none.
    """

    def __init__(
        self, model: Any, layers: Mapping[int, nn.Module], norms: Mapping[int, nn.Module]
    ) -> None:
        self.model = model
        self.layers, self.norms = dict(layers), dict(norms)
        self.n_layers = len(model.get_decoder().layers)
        self._views: dict[int, Any] = {self.n_layers: model}
        for exit, layer in self.layers.items():
            _renumber(layer, exit)
        for exit in self.norms:
            self._views[exit] = self._view(exit)

    @property
    def depths(self) -> tuple[int, ...]:
        """The exits, and the whole model last."""
        return (*sorted(self.norms), self.n_layers)

    def at(self, depth: int) -> Any:
        """The causal model of a depth: the exit's k + 1 layers, or the base itself."""
        return self._views[depth]

    def logits(self, hidden: Tensor, exit: int, cache: Any = None) -> Tensor:
        """Logits (batch, length, vocabulary) of an exit from the states behind the base's first
        `exit` layers, (batch, length, width).

        `cache`: `Slots.head(exit)` where the exit's layer shall see and keep earlier positions;
        None: `hidden` holds every position from the first.
        """
        head = self._head(exit)
        if not self.layers:
            return _shaped(self.model, self.norms[exit](hidden))

        def instead(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            given = {**named, "hidden_states": hidden} if not args else named
            return ((hidden, *args[1:]) if args else args), given

        handle = self.layers[exit].register_forward_pre_hook(instead, with_kwargs=True)
        try:
            found: Tensor = head(
                inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None
            ).logits
        finally:
            handle.remove()
        return found

    def new_slots(self) -> Slots:
        """An empty cache with a slot for every layer of the base and one for every exit."""
        return Slots(self)

    def _view(self, exit: int) -> Any:
        decoder = self.model.get_decoder()
        kept = list(decoder.layers)[:exit]
        own = [self.layers[exit]] if self.layers else []
        types = getattr(decoder.config, "layer_types", None)
        shown = None if types is None else [*types[:exit], *types[-1:]][: len(kept) + len(own)]
        return _with_layers(self.model, [*kept, *own], self.norms[exit], shown)

    def _head(self, exit: int) -> Any:
        """A model of the exit's layer alone, which believes to be behind `exit` others."""
        if not self.layers:
            return None
        types = getattr(self.model.get_decoder().config, "layer_types", None)
        shown = None if types is None else types[-1:]
        return _with_layers(self.model, [self.layers[exit]], self.norms[exit], shown)


class Slots:
    """Keys and values of one request: the base's layers, then one slot for each exit's own.

    `at(depth)` is the cache to give to `Exits.at(depth)`: it holds the same slot objects, so that
    depths share what the first layers computed. What a depth has not run is not filled: a request
    that goes deeper has to run the layers between for earlier positions first.
    """

    def __init__(self, exits: Exits) -> None:
        from transformers import DynamicCache

        config = exits.model.config.get_text_config()
        self._base: list[Any] = DynamicCache(config=config).layers
        # the exit's layer is of the kind of the last one, and so is its slot
        self._own = {exit: DynamicCache(config=config).layers[-1] for exit in exits.layers}
        self._n_layers = exits.n_layers

    def at(self, depth: int) -> Any:
        from transformers.cache_utils import Cache

        own = [self._own[depth]] if depth in self._own else []
        return Cache(layers=[*self._base[:depth], *own])

    def head(self, exit: int) -> Any:
        """The cache of an exit's layer alone, for `Exits.logits`; its layer asks for slot `exit`,
        masks ask the first."""
        from transformers.cache_utils import Cache

        return Cache(layers=[self._own[exit]] * (exit + 1))

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, in every slot that holds more. Raises
        ValueError where a slot keeps a window alone."""
        for slot in (*self._base, *self._own.values()):
            if slot.is_initialized and slot.get_seq_length() > length:
                slot.crop(length - slot.get_seq_length())


def open_exits(
    folder: ExitFolder | Path,
    model: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
) -> Exits:
    """Open exits and, unless `model` is it already, their base.

    Raises ShortstackError for damaged files and for another base than they were made for; a
    `model` in memory is believed.
    """
    found = folder if isinstance(folder, ExitFolder) else read_exits(folder)
    if model is None:
        base = found.open_base()
        model = load(base.path, dtype).to(device)
    tensors = {exit: found.load(exit) for exit in found.exits}
    return with_tensors(model, tensors)


def with_tensors(model: Any, tensors: Mapping[int, Mapping[str, Tensor]]) -> Exits:
    """Exits of a model in memory from the tensors of each: `norm.weight`, `layer.` and a name."""
    return Exits(model, *exit_modules(model, tensors, model.dtype))


def exit_modules(
    model: Any, tensors: Mapping[int, Mapping[str, Tensor]], dtype: torch.dtype
) -> tuple[dict[int, nn.Module], dict[int, nn.Module]]:
    """(layers, norms) by exit, made like the model's last layer and norm, on its device."""
    decoder = model.get_decoder()
    layers: dict[int, nn.Module] = {}
    norms: dict[int, nn.Module] = {}
    for exit, given in tensors.items():
        own = {n.removeprefix("layer."): t for n, t in given.items() if n.startswith("layer.")}
        if own:
            layers[exit] = _filled(decoder.layers[-1], own, dtype)
        norms[exit] = _filled(decoder.norm, {"weight": given["norm.weight"]}, dtype)
    return layers, norms


def base_tensors(model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What an exit begins as if it is a copy: the last layer and the norm, float32 copies."""
    from shortstack.exits.folder import layer_rules

    decoder = model.get_decoder()
    last = dict(decoder.layers[-1].named_parameters())
    made = {f"layer.{r.hf}": last[r.hf].detach().float().clone() for r in layer_rules(checkpoint)}
    return {**made, "norm.weight": decoder.norm.weight.detach().float().clone()}


def _filled(like: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    made = copy.deepcopy(like).to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(tensors[name].to(dtype))
    return made


def _renumber(layer: nn.Module, index: int) -> None:
    """Tell a layer its slot in a cache."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]  # a number, which Module types not


def _with_layers(
    model: Any, layers: list[Any], norm: nn.Module, layer_types: list[str] | None
) -> Any:
    """The model with other layers in its decoder; everything else is shared, nothing is copied."""
    decoder = model.get_decoder()
    made = _shell(decoder)
    made.layers, made.norm = nn.ModuleList(layers), norm
    made.config = _config(decoder.config, len(layers), layer_types)
    path = next(name for name, module in model.named_modules() if module is decoder)
    outer = parent = _shell(model)
    *above, last = path.split(".")
    for name in above:
        inner = _shell(getattr(parent, name))
        setattr(parent, name, inner)
        parent = inner
    setattr(parent, last, made)
    outer.config = made.config if model.config is decoder.config else model.config
    return outer


def _shell(module: Any) -> Any:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def _config(config: Any, n_layers: int, layer_types: list[str] | None) -> Any:
    made = copy.deepcopy(config)
    made.num_hidden_layers = n_layers
    if layer_types is not None:
        made.layer_types = layer_types
    return made


def _shaped(model: Any, hidden: Tensor) -> Tensor:
    """Logits as the family makes them of what the last norm gave."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return (logits / cap).tanh() * cap if cap else logits
