"""Exits in training: one forward pass of the frozen model feeds all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shortstack.prune.exits.divergence import joint_divergence, student_rows, teacher_rows
from shortstack.prune.heal.distill import next_token, summed_loss
from shortstack.prune.heal.model import head_of


class ExitStudent(nn.Module):
    """Gives the loss of all exits together, as `heal.Student` does of one model.

    `model` holds what learns: a module for each exit, `layer` and `norm`. The frozen model is no
    part of it. `low`: products in bfloat16. `compiled`: the passes over logits are fused by
    torch.compile, which wants a C++ compiler, on a card Triton too.
    """

    def __init__(
        self,
        frozen: Any,
        layers: dict[int, nn.Module],
        norms: dict[int, nn.Module],
        low: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.exits = tuple(sorted(norms))
        self.model = nn.ModuleDict(
            {
                str(exit): nn.ModuleDict(
                    ({"layer": layers[exit]} if layers else {}) | {"norm": norms[exit]}
                )
                for exit in self.exits
            }
        )
        self._frozen = (frozen,)  # in a tuple: not moved, trained or saved with this module
        self._low = low
        self._kernels: Any = (teacher_rows, student_rows)
        if compiled:
            self._kernels = tuple(torch.compile(one, dynamic=True) for one in self._kernels)

    def forward(self, tokens: Tensor, targets_only: bool = False, top: None = None) -> Tensor:
        """Summed over the (length - 1) * windows predictions of `tokens`, the mean over exits: KL
        of the model's distribution to the exit's (Balcony: mean_k KL, temperature 1), or, with
        `targets_only`, nats of the next token."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._low):
            hidden, teacher = self.states(tokens)
            head = head_of(self._frozen[0])
            if targets_only:
                targets = tokens[:, 1:].flatten()
                nats = [summed_loss(states, head, next_token(targets)) for states in hidden]
                return torch.stack(nats).mean()
            return joint_divergence(hidden, teacher, head, self._kernels).mean()

    def figures(self, tokens: Tensor) -> Tensor:
        """(exits + 1, 3) float64, summed over the same predictions: KL to the model, nats of the
        next token, and at how many positions the likeliest token is the model's; the model last."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._low):
            hidden, teacher = self.states(tokens)
            head, targets = head_of(self._frozen[0]), tokens[:, 1:].flatten()
            kl = joint_divergence([*hidden, teacher], teacher, head)
            rows = []
            for states, divergence in zip((*hidden, teacher), kl, strict=True):
                nats = summed_loss(states, head, next_token(targets))
                same = sum(
                    (head.logits(a).argmax(-1) == head.logits(b).argmax(-1)).sum()
                    for a, b in zip(states.split(512), teacher.split(512), strict=True)
                )
                rows.append(torch.stack([divergence, nats, torch.as_tensor(same)]).double())
        return torch.stack(rows)

    def states(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """After the norm, of every position that has a next token, flattened: of each exit, and of
        the whole model."""
        with torch.no_grad():
            found, named, final = behind(self._frozen[0], tokens, self.exits)
        made = []
        for exit in self.exits:
            states, own = found[exit], self.model[str(exit)]
            if "layer" in own:  # type: ignore[operator]  # a ModuleDict, which is indexed as a Module
                output = own["layer"](states, **named)  # type: ignore[index]
                states = output[0] if isinstance(output, tuple) else output
            made.append(own["norm"](states)[:, :-1].flatten(0, 1))  # type: ignore[index]
        return made, final[:, :-1].flatten(0, 1)


def behind(
    model: Any, tokens: Tensor, exits: Sequence[int]
) -> tuple[dict[int, Tensor], dict[str, Any], Tensor]:
    """Run the model once: states behind its first k layers for each exit k, what else its last
    layer was given (an exit's layer is of that kind), and the states after its norm."""
    layers = model.get_decoder().layers
    found: dict[int, Tensor] = {}
    arguments: dict[str, Any] = {}

    def note(exit: int) -> Any:
        def hook(module: Any, args: Any, named: dict[str, Any]) -> None:
            found[exit] = args[0] if args else named["hidden_states"]

        return hook

    def last(module: Any, args: Any, named: dict[str, Any]) -> None:
        arguments.update({k: v for k, v in named.items() if k != "hidden_states"})

    hooks = [layers[k].register_forward_pre_hook(note(k), with_kwargs=True) for k in exits]
    hooks.append(layers[-1].register_forward_pre_hook(last, with_kwargs=True))
    try:
        final = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return found, arguments, final
