"""How much the loss minds an error in each row of each matrix, from one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress
from shortstack.prune.calibrate import LayerwiseModel

HEAD_TOKENS = 256


@dataclass(frozen=True)
class Sensitivity:
    """Means over calibration tokens t, of a model with the loss L in nats a token.

    `outputs`: matrix name -> E[g_r^2], (rows,), with g = dL/dy at the matrix's output y. With
    inputs x, an error e of row r costs about g_r^2 (e . x)^2 / 2: the diagonal of the
    Kronecker-factored Fisher matrix (Martens and Grosse, arXiv:1503.05671). `head`: the same of
    the head's rows, E[p_v (1 - p_v)] of the predicted distribution p. `lookup`: of the embedding's
    rows, E[1(token = v) g_j^2], mean over j, as an input. `head_gram`: E[h h^T] of what the head
    multiplies, (width, width).
    """

    outputs: dict[str, Tensor]
    head: Tensor
    lookup: Tensor
    head_gram: Tensor


def measure(
    checkpoint: Checkpoint,
    model: LayerwiseModel,
    parts: Sequence[Tensor],
    seed: int,
    progress: OnProgress,
    finals: list[Tensor] | None = None,
) -> Sensitivity:
    """Run `parts`, batches of tokens, forwards and backwards. Next tokens are drawn from the
    model's own distribution with `seed`: gradients at the text's would not give Fisher's matrix.
    `finals` is given what the head read of each part, (windows, length - 1, width)."""
    module, family = model.module, checkpoint.family
    head, bias, shaping = model.head()
    generator = torch.Generator(device=head.device).manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    rows, width = head.shape
    found = Sensitivity(
        outputs, head.new_zeros(rows), head.new_zeros(rows), head.new_zeros(width, width)
    )
    model.freeze()
    n_tokens = sum(tokens[:, 1:].numel() for tokens in parts)
    with ExitStack() as stack:
        for index in range(model.n_layers):
            for name, projection in model.projections(index).items():
                full = family.layer_prefix.format(i=index) + name
                outputs[full] = projection.weight.new_zeros(len(projection.weight))
                hook = projection.register_full_backward_hook(_adding(outputs[full]))
                stack.callback(hook.remove)
        embedded = stack.enter_context(_leaf_embeddings(module))
        for done, tokens in enumerate(parts, 1):
            states = module.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            upstream = torch.zeros_like(states)
            flat = states.detach()[:, :-1].flatten(0, 1)
            if finals is not None:
                finals.append(states.detach()[:, :-1].clone())
            grads = [
                _at_head(hidden, head, bias, shaping, found, generator)
                for hidden in flat.split(HEAD_TOKENS)
            ]
            upstream[:, :-1] = torch.cat(grads).view_as(upstream[:, :-1])
            states.backward(upstream)
            _add_lookup(found.lookup, tokens, embedded.pop(), module.get_input_embeddings())
            progress(done, len(parts))
    for sums in (*outputs.values(), found.head, found.lookup, found.head_gram):
        sums /= n_tokens
    return found


def no_numbers(what: str) -> ShortstackError:
    """The error of a model whose numbers leave float32 on the calibration text."""
    return ShortstackError(
        f"{what} cannot be reckoned with on the calibration text: a norm or a weight is beyond all "
        "others. Mend the model, or quantize it with --method plain, which needs no text."
    )


def _adding(sums: Tensor) -> Any:
    def add(module: Any, inputs: Any, gradients: tuple[Tensor, ...]) -> None:
        sums.add_(gradients[0].flatten(0, -2).square().sum(0))

    return add


@contextmanager
def _leaf_embeddings(module: Any) -> Iterator[list[Tensor]]:
    """Let gradients reach what the embedding gives, which is noted, and no weight."""
    noted: list[Tensor] = []

    def leaf(embedding: Any, inputs: Any, output: Tensor) -> Tensor:
        noted.append(output.detach().requires_grad_())
        return noted[-1]

    handle = module.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield noted
    finally:
        handle.remove()


def _at_head(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    shaping: dict[str, Any],
    found: Sensitivity,
    generator: torch.Generator,
) -> Tensor:
    """Gradients of -log p(drawn token) at `hidden`, (tokens, width); adds the head's own sums."""
    logits = torch.nn.functional.linear(hidden, head, bias) * shaping["scale"]
    slope: Tensor | float = shaping["scale"]
    if shaping["cap"]:
        bounded = torch.tanh(logits / shaping["cap"])
        logits, slope = shaping["cap"] * bounded, (1 - bounded.square()) * slope
    chances = logits.softmax(-1)
    if not torch.isfinite(chances).all():
        raise no_numbers("the logits of the model")
    found.head.add_((chances * (1 - chances) * slope * slope).sum(0))
    found.head_gram.addmm_(hidden.T, hidden)
    drawn = torch.multinomial(chances, 1, generator=generator)
    gradient = chances.scatter_add(1, drawn, chances.new_full(drawn.shape, -1.0)) * slope
    made: Tensor = gradient @ head
    return made


def _add_lookup(sums: Tensor, tokens: Tensor, leaf: Tensor, embedding: Any) -> None:
    assert leaf.grad is not None
    scale = float(getattr(embedding, "embed_scale", 1.0))  # Gemma 3 multiplies what it looks up
    sums.index_add_(0, tokens.flatten(), (leaf.grad * scale).square().mean(-1).flatten())
