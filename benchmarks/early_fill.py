"""What tokens that left early do to those that come after them, by what is kept of them.

    python -m benchmarks.early_fill MODEL --data DIR [--device cpu] [--dtype float32] [--json FILE]
        [--leave-after 22 15 8] [--windows 12] [--every 2]

Test articles of WikiText-2, windows of 128 tokens, read token by token after 16 read as a prompt.
All tokens but every second (`--every`) leave after some layers, whatever they hold; what they
would say is not scored. The others run through all layers, look back at those that left, and are
scored: perplexity over theirs in the whole model, where nobody leaves, with a bootstrap over
windows. Layers behind an exit keep of a token what its state there gives as keys and values
(`state`; CALM, arXiv:2207.07061), zeros, or nothing (`none`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.early_text import texts, windows

from shortstack.checkpoint import Checkpoint
from shortstack.early_exit.rule import STATE, Rule
from shortstack.evaluate import metrics
from shortstack.evaluate.codec import FolderCodec
from shortstack.runtimes.pytorch import PyTorchSession
from shortstack.runtimes.pytorch_early_tokens import FILLS, EarlyTokenSession

PROMPT_TOKENS, WINDOW_TOKENS = 16, 128
HEAD = (
    "| leave after | kept of them | perplexity | over the whole model's (95 %) | layers a token |\n"
    "|---:|---|---:|---:|---:|"
)


class ToldSession(EarlyTokenSession):
    """Tokens leave when they are told to."""

    def __init__(self, path: Path, after: int, fill: str, **more: Any) -> None:
        model = Checkpoint.open(path)
        width = int(model.config["hidden_size"])
        weights, bias = np.zeros((1, width), np.float32), np.zeros(1, np.float32)
        rule = Rule((after,), STATE, weights, bias, math.inf, model_sha256=model.sha256)
        super().__init__(path, rule, fill=fill, **more)

    def leave(self, *, early: bool) -> None:
        """What the next token does."""
        self._checks.threshold = -math.inf if early else math.inf


def nats(session: PyTorchSession, window: Sequence[int], every: int) -> list[float]:
    """Of each token that follows one which ran through all layers."""
    session.prefill(window[:PROMPT_TOKENS])
    found = []
    for at in range(PROMPT_TOKENS, len(window) - 1):
        stays = at % every == 0
        if isinstance(session, ToldSession):
            session.leave(early=not stays)
        logits = session.decode(window[at]).astype(np.float64)
        if stays:
            logits -= logits.max()
            found.append(float(np.log(np.exp(logits).sum()) - logits[window[at + 1]]))
    return found


def row(session: PyTorchSession, read: Sequence[Sequence[int]], every: int) -> dict[str, Any]:
    found = np.array([nats(session, window, every) for window in read])
    made: dict[str, Any] = {"nats": found.mean(1).tolist()}
    if isinstance(session, EarlyTokenSession):
        made["layers"] = session.layers_run / session.steps
    return made


def against(one: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Perplexity, and over the whole model's."""
    mine, theirs = np.array(one["nats"]), np.array(whole["nats"])
    ratio = metrics.bootstrap(lambda at: math.exp(float((mine - theirs)[at].mean())), len(mine))
    return {**one, "perplexity": math.exp(float(mine.mean())), "ratio": ratio.to_dict()}


def line(one: dict[str, Any]) -> str:
    ratio = one["ratio"]
    return (
        f"| {one['after']} | {one['fill']} | {one['perplexity']:.1f} | {ratio['estimate']:.2f} "
        f"({ratio['low']:.2f} to {ratio['high']:.2f}) | {one['layers']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--leave-after", type=int, nargs="+", default=[22, 15, 8])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--every", type=int, default=2, help="one of so many tokens stays")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    documents = texts(asked.data, "general/wikitext2", "test")
    read = windows(FolderCodec(asked.model), documents, WINDOW_TOKENS, asked.windows)
    more = {
        "threads": torch.get_num_threads(),
        "context_tokens": WINDOW_TOKENS,
        "device": asked.device,
        "dtype": asked.dtype,
    }
    with PyTorchSession(asked.model, **more) as session:
        whole = row(session, read, asked.every)
    whole |= {"after": "–", "fill": "whole model"}
    whole["layers"] = float(Checkpoint.open(asked.model).n_layers)
    rows = [against(whole, whole)]
    print(HEAD)
    print(line(rows[0]), flush=True)
    for after in asked.leave_after:
        for fill in FILLS:
            with ToldSession(asked.model, after, fill, **more) as session:
                one = row(session, read, asked.every) | {"after": after, "fill": fill}
            rows.append(against(one, whole))
            print(line(rows[-1]), flush=True)
    if asked.json:
        facts = {"windows": len(read), "every": asked.every, "device": asked.device, "rows": rows}
        asked.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
