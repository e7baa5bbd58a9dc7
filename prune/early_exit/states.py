"""What a fit looks at: each prompt's state at its last position after each checked layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortstack.early_exit.batches import batches
from shortstack.early_exit.checks import ModelHead, padded_answers
from shortstack.early_exit.prompts import Prompt
from shortstack.early_exit.watched import Run, watched
from shortstack.progress import OnProgress, silent


@dataclass(frozen=True)
class States:
    """`hidden`: (rows, checks, width), float32, on the CPU; `logits`: of the whole model for each
    row's answers, (rows, most), -inf where a row has fewer; `right`: (rows,)."""

    layers: tuple[int, ...]
    hidden: Tensor
    logits: Tensor
    answers: Tensor
    right: Tensor

    @property
    def full(self) -> Tensor:
        """The whole model's answers, (rows,)."""
        return self.logits.argmax(-1)

    def rows(self, chosen: Tensor) -> States:
        parts = (self.hidden, self.logits, self.answers, self.right)
        return States(self.layers, *(part[chosen] for part in parts))


def collect(
    model: Any,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    batch_tokens: int | None = None,
    progress: OnProgress = silent,
) -> States:
    """Run every prompt through the whole model. `layers`: numbers of layers run before a check."""
    head = ModelHead(model)
    wanted = {n_run - 1: place for place, n_run in enumerate(layers)}
    most = max(len(prompt.answers) for prompt in prompts)
    hidden = torch.empty((len(prompts), len(layers), model.config.get_text_config().hidden_size))
    logits = torch.full((len(prompts), most), -torch.inf)
    done = 0
    for batch in batches(prompts, head.device, batch_tokens):
        index = torch.tensor(batch.index)
        rows = torch.arange(len(index), device=head.device)

        def keep(
            layer: int,
            run: Run,
            states: Tensor,
            named: dict[str, Any],
            index: Tensor = index,
            rows: Tensor = rows,
            last: Tensor = batch.last,
        ) -> Tensor:
            states = run(states, **named)
            if layer in wanted:
                hidden[index, wanted[layer]] = states[rows, last].float().cpu()
            return states

        with torch.inference_mode(), watched(model, keep):
            made = model.get_decoder()(input_ids=batch.tokens, use_cache=False).last_hidden_state
            found = head.answer_logits(made[rows, batch.last], head.rows(batch.answers))
        logits[index, : found.shape[1]] = found
        done += len(index)
        progress(done, len(prompts))
    answers = padded_answers([prompt.answers for prompt in prompts])
    return States(tuple(layers), hidden, logits, answers, torch.tensor([p.right for p in prompts]))
