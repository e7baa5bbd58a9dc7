"""The student as a module that returns its loss, so that every wrapper of Accelerate fits it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune.heal.distill import (
    Chunk,
    Head,
    Top,
    divergence,
    mixed,
    next_token,
    summed_loss,
    top_divergence,
)
from shortstack.prune.heal.settings import HealSettings


def head_of(model: Any) -> Head:
    """The head with what the config does to its logits (Granite's scale, Gemma 2's cap)."""
    output, config = model.get_output_embeddings(), model.config.get_text_config()
    return Head(
        output.weight,
        output.bias,
        scale=1 / (getattr(config, "logits_scaling", None) or 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


def final_hidden(model: Any, tokens: Tensor) -> Tensor:
    """Hidden states after the last norm, of every position that has a next token, flattened."""
    states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    flat: Tensor = states[:, :-1].flatten(0, 1)
    return flat


class Student(nn.Module):
    """Runs the student, and the teacher where the loss wants one; gives the summed loss.

    `low`: products in bfloat16. Not by Accelerate, which allows one precision in a process's life.
    """

    def __init__(
        self, model: nn.Module, teacher: Any, settings: HealSettings, low: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._teacher = (teacher,)  # in a tuple: the teacher is no part of this module
        self._settings = settings
        self._low = low
        # read by Accelerate where it wraps layers one by one
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, tokens: Tensor, targets_only: bool = False, top: Top | None = None) -> Tensor:
        """Loss summed over the (length - 1) * windows predictions of `tokens`.

        `targets_only`: nats of the next token, whatever the loss is; what perplexity needs. `top`:
        the teacher's likeliest tokens at those predictions, from a cache.
        """
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._low):
            if self._settings.loss == "mse" and not targets_only:
                return self._replaced(tokens)
            chunk = next_token(tokens[:, 1:].flatten())
            if not targets_only and self._settings.loss != "ce":
                kl = self._divergence(tokens, top)
                alpha = self._settings.alpha
                chunk = kl if self._settings.loss == "kl" else mixed(kl, chunk, alpha)
            return summed_loss(final_hidden(self.model, tokens), head_of(self.model), chunk)

    def _divergence(self, tokens: Tensor, top: Top | None) -> Chunk:
        temperature, k = self._settings.temperature, self._settings.top_k
        if top is not None:
            return top_divergence(lambda rows: top[rows], temperature)
        teacher = self._teacher[0]
        with torch.no_grad():
            hidden, head = final_hidden(teacher, tokens), head_of(teacher)
        if k is None:
            return divergence(lambda rows: head.logits(hidden[rows]), temperature)
        return top_divergence(
            lambda rows: Top.of(head.logits(hidden[rows]), k, temperature), temperature
        )

    def _replaced(self, tokens: Tensor) -> Tensor:
        """Squared distance of hidden states, the mean over width, summed over positions
        (LLM-Streamline, arXiv:2403.19135, section 3.2: ||g(h_l) - h_(l+n)||^2).

        All but the first position: its state is a sink for attention, in SmolLM2 of squares some
        hundred times all others' together, and what the layer learns else is that one vector.
        Below the run both models are one: the teacher's states feed the student's layer.
        """
        assert self._settings.replaces is not None
        first, last = self._settings.replaces
        with torch.no_grad():
            inputs, named, wanted = across(self._teacher[0], tokens, first, last)
        layers: Any = self.model.get_decoder().layers  # type: ignore[operator]
        output = layers[first](inputs, **named)
        made = output[0] if isinstance(output, tuple) else output
        squares = (made.float() - wanted.float()).square().mean(-1)
        total: Tensor = squares[:, 1:].sum()
        return total


class _Enough(Exception):
    """Ends a forward pass whose later layers nobody needs."""


def across(
    model: Any, tokens: Tensor, first: int, last: int
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Hidden states before layer `first`, what else it was given, and those after layer `last`."""
    layers = model.get_decoder().layers
    seen: list[Any] = []

    def before(module: Any, args: Any, named: dict[str, Any]) -> None:
        seen.extend((args[0] if args else named.pop("hidden_states"), named))

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    hooks = (
        layers[first].register_forward_pre_hook(before, with_kwargs=True),
        layers[last].register_forward_hook(after),
    )
    try:
        model.get_decoder()(input_ids=tokens, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    inputs, named, wanted = seen
    return inputs, named, wanted


def freeze(model: nn.Module, checkpoint: Checkpoint, settings: HealSettings) -> None:
    """Let only what `settings.train` names learn; a removed sub-block stays removed."""
    if settings.lora_rank is not None:
        from shortstack.prune.heal.lora import add_lora

        add_lora(model, checkpoint, settings.lora_rank)
        return
    layers = trained_layers(checkpoint, settings)
    for name, parameter in model.named_parameters():
        stored = stored_name(name, checkpoint)
        known = stored in checkpoint.tensors  # a vision tower goes by other names
        wanted = layers is None or checkpoint.family.layer_of(stored) in layers
        parameter.requires_grad_(known and wanted and not is_gone(stored, checkpoint))


def stored_name(name: str, checkpoint: Checkpoint) -> str:
    """The name in the files of a tensor in memory; they differ where a decoder is nested."""
    if not checkpoint.family.nested:
        return name
    prefix = checkpoint.family.layer_prefix.partition("model.layers.")[0]
    inner = name.removeprefix("model.language_model.")
    if inner != name:
        return f"{prefix}model.{inner}"
    return prefix + name if name.startswith("lm_head.") else name


def is_gone(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a stored tensor is of a sub-block that was removed alone: exports leave it out, so
    that its zeros must stay."""
    layer = checkpoint.family.layer_of(name)
    inner = {"attention": ".self_attn.", "mlp": ".mlp."}
    return any(layer in gone and inner[part] in name for part, gone in checkpoint.removed.items())


def trained_layers(checkpoint: Checkpoint, settings: HealSettings) -> frozenset[int] | None:
    """Layers that learn, by their number in the student; None for all and what is outside."""
    kind, _, listed = settings.train.partition(":")
    if kind == "layers":
        layers = frozenset(int(number) for number in listed.split(","))
    elif kind == "neighbours":
        layers = neighbours(checkpoint)
    else:
        return None
    beyond = sorted(layer for layer in layers if layer >= checkpoint.n_layers)
    if beyond:
        raise ShortstackError(
            f"there is no layer {beyond[0]} to train: the student has layers 0 to "
            f"{checkpoint.n_layers - 1}. Name one of those."
        )
    return layers


def neighbours(checkpoint: Checkpoint) -> frozenset[int]:
    """The kept layers on either side of each cut, from the plan beside the config."""
    gone = frozenset(checkpoint.cut_facts.get("drop") or ())
    keep = [layer for layer in range(checkpoint.n_layers + len(gone)) if layer not in gone]
    beside = frozenset(new for new, old in enumerate(keep) if old - 1 in gone or old + 1 in gone)
    if not beside:
        raise ShortstackError(
            f"{checkpoint.path} has no plan.json with dropped layers, so no layer is beside a cut. "
            "Name the layers: layers:3,4"
        )
    return beside
