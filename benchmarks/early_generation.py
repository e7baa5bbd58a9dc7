"""Generation: early exit with and without filling the cache, and self-speculation.

    python -m benchmarks.early_generation MODEL --data DIR --out OUT [--device cuda:0]
        [--dtype float32] [--part exit speculate] [--prompts 200] [--tokens 64] [--exits FOLDER]
        [--skip 4 8 12] [--draft 2 4 6] [--vocabulary 8192] [--reorder] [--split validation]

`exit` (perplexity of WikiText-2 read token by token, LAMBADA's last words, and continuations held
against the whole model's): the rule is fitted to tokens of tinyshakespeare and the validation
articles' first half, its threshold to the second half; tested on test articles. The rows "state",
"zeros" and "none" differ in what layers behind an exit keep of a token.

`speculate` (benchmarks.speculation): prompts are beginnings of test articles and LAMBADA passages;
layers to skip are chosen on text that the model wrote after validation beginnings. `--exits` adds
drafts through the exits of `shortstack exits train`; `--vocabulary`: drafts say these many tokens,
counted in validation articles and train rows; `--reorder`: all multiply in oneDNN's order. With
`--split validation` the articles' second half is continued and the first half chooses: for tuning.
Every output is held against the whole model's own greedy tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.early_text import PROMPT_TOKENS, WINDOW_TOKENS, texts, windows
from benchmarks.speculation import SPECULATE_HEAD, add_options, speculate_line, speculate_part

from shortstack.checkpoint import Checkpoint
from shortstack.early_exit.rule import Rule
from shortstack.early_exit.rule_file import write_rule
from shortstack.errors import ShortstackError
from shortstack.evaluate import generation, metrics
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.session_scorer import SessionScorer
from shortstack.evaluate.sets import SetSpec
from shortstack.pretrained import load
from shortstack.progress import silent
from shortstack.prune.early_exit.tokens import fit_tokens, token_states
from shortstack.runtimes.pytorch import PyTorchSession
from shortstack.runtimes.pytorch_early_tokens import FILLS, EarlyTokenSession

CONTEXT, FIT_WINDOWS = 512, 48


def session_of(args: argparse.Namespace, rule: Rule | None, fill: str) -> PyTorchSession:
    more = {
        "threads": torch.get_num_threads(),
        "context_tokens": CONTEXT,
        "device": args.device,
        "dtype": args.dtype,
    }
    if rule is None:
        return PyTorchSession(args.model, **more)
    return EarlyTokenSession(args.model, rule, fill=fill, **more)


def read_aloud(session: PyTorchSession, window: Sequence[int]) -> tuple[list[float], float]:
    """(nats of every token but the first two, seconds a step): decode steps all, as in
    generation."""
    logits = session.prefill(window[:1])
    nats, begun = [], time.perf_counter()
    for at, token in enumerate(window[1:], 1):
        if at > 1:  # the first comes from the prompt, through all layers
            shifted = logits.astype(np.float64) - logits.max()
            nats.append(float(np.log(np.exp(shifted).sum()) - shifted[token]))
        logits = session.decode(token)
    return nats, (time.perf_counter() - begun) / (len(window) - 1)


def continued(session: PyTorchSession, prompt: Sequence[int], count: int) -> list[int]:
    ids = [int(session.prefill(prompt).argmax())]
    while len(ids) < count:
        ids.append(int(session.decode(ids[-1]).argmax()))
    return ids


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """Share of runs of n tokens that came before in the same text."""
    runs = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def text_rule(model: Any, codec: FolderCodec, args: argparse.Namespace, changed: float) -> Rule:
    articles = texts(args.data, "general/wikitext2", "validation")
    half = len(articles) // 2
    own = [*texts(args.data, "general/tinyshakespeare", "train")[:20], *articles[:half]]
    n_layers = len(model.get_decoder().layers)
    layers = tuple(range(args.first, n_layers, args.every))
    fit, validation = (
        token_states(model, windows(codec, part, WINDOW_TOKENS, args.fit_windows), layers)
        for part in (own, articles[half:])
    )
    sha256 = Checkpoint.open(args.model).sha256
    return fit_tokens(model, fit, validation, layers, max_changed=changed, model_sha256=sha256)


def exit_part(model: Any, codec: FolderCodec, args: argparse.Namespace) -> dict[str, Any]:
    tested = texts(args.data, "general/wikitext2", "test")
    read = windows(codec, tested, WINDOW_TOKENS, args.read_windows)
    prompts = windows(codec, tested, PROMPT_TOKENS, args.continuations)
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for changed in (None, *args.changed):
        try:
            rule = None if changed is None else text_rule(model, codec, args, changed)
        except ShortstackError as error:
            rows.append({"rule": f"{changed:g} changed", "refused": str(error)})
            continue
        if rule is not None:
            write_rule(rule, args.out / f"tokens-{changed:g}.safetensors")
        for fill in ("whole model",) if rule is None else FILLS:
            with session_of(args, rule, fill) as session:
                row = tested_session(session, codec, read, prompts, args)
            row |= {"rule": "–" if changed is None else f"{changed:g} changed", "fill": fill}
            if rule is not None:
                row["checks"] = list(rule.layers)
                row["validation"] = rule.facts["validation"]
            compare(row, first or row, model)
            first = first or row
            rows.append(row)
            print(exit_line(row), flush=True)
    for row in rows:
        row.pop("continuations", None)
        row.pop("lambada_rows", None)
    return {"rows": rows, "read_windows": len(read), "continuations": len(prompts)}


def tested_session(
    session: PyTorchSession,
    codec: FolderCodec,
    read: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    read_aloud(session, read[0][:8])  # sets libraries up
    if isinstance(session, EarlyTokenSession):
        session.reset_counts()
    nats, steps = zip(*(read_aloud(session, window) for window in read), strict=True)
    layers = None
    if isinstance(session, EarlyTokenSession):
        layers = session.layers_run / session.steps
    row: dict[str, Any] = {
        "perplexity": metrics.perplexity([sum(n) for n in nats], [len(n) for n in nats]).to_dict(),
        "layers": layers,
        "step_s": statistics.median(steps),
        "continuations": [continued(session, prompt, args.tokens) for prompt in prompts],
        "prompts": [list(prompt) for prompt in prompts],
    }
    (file,) = sorted((args.data / "general/lambada").glob("test.jsonl*"))
    spec = SetSpec("lambada", "generation", file, limit=args.lambada, max_tokens=8)
    scorer = SessionScorer(Reading(session), max_tokens=CONTEXT)
    row["lambada_rows"] = [one["right"] for one in generation.score(scorer, codec, spec, 0, silent)]
    return row


class Reading:
    """A session that reads its prompts' second half token by token: an exit has its effect there,
    too, which one word alone would not show."""

    def __init__(self, session: PyTorchSession) -> None:
        self._session = session
        self.vocab_size, self.info = session.vocab_size, session.info

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> Any:
        half = max(1, len(tokens) // 2)
        logits = self._session.prefill(tokens[:half])
        for token in tokens[half:]:
            logits = self._session.decode(token)
        return logits

    def decode(self, token: int) -> Any:
        return self._session.decode(token)

    def tokenize(self, text: str) -> list[int] | None:
        return self._session.tokenize(text)

    def close(self) -> None:
        return None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def compare(row: dict[str, Any], first: dict[str, Any], model: Any) -> None:
    """Against the whole model: the same tokens, what it thinks of these, and repetition."""
    pairs = list(zip(row["continuations"], first["continuations"], strict=True))
    row["same_tokens"] = statistics.mean(
        sum(a == b for a, b in zip(ours, whole, strict=True)) / len(whole) for ours, whole in pairs
    )
    row["judged"] = judged(model, row.pop("prompts"), row["continuations"])
    row["repeated"] = statistics.mean(repeated(ours) for ours, _ in pairs)
    right = row["lambada_rows"]
    row["lambada"] = metrics.wilson(sum(right), len(right)).to_dict()
    row["lambada_difference"] = metrics.paired_difference(first["lambada_rows"], right).to_dict()


def judged(
    model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> float:
    """Perplexity of the continuations under the whole model."""
    total, count = 0.0, 0
    device = model.get_output_embeddings().weight.device
    for prompt, ours in zip(prompts, continuations, strict=True):
        ids = torch.tensor([[*prompt, *ours]], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += float(-logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())
        count += len(ours)
    return math.exp(total / count)


EXIT_HEAD = (
    "| tokens changed | behind an exit | layers a token | ms a token | perplexity | LAMBADA | "
    "same tokens | judged by the whole model | repeated |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|"
)


def exit_line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| {row['rule']} | {row['refused']} | | | | | | | |"
    layers = "all" if row["layers"] is None else f"{row['layers']:.1f}"
    perplexity, lambada = row["perplexity"], row["lambada"]
    return (
        f"| {row['rule']} | {row['fill']} | {layers} | {row['step_s'] * 1e3:.2f} | "
        f"{perplexity['estimate']:.1f} ({perplexity['low']:.1f} to {perplexity['high']:.1f}) | "
        f"{lambada['estimate']:.2f} ({lambada['low']:.2f} to {lambada['high']:.2f}) | "
        f"{row['same_tokens']:.2f} | {row['judged']:.1f} | {row['repeated']:.2f} |"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--part", nargs="+", default=["exit", "speculate"])
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--first", type=int, default=10)
    parser.add_argument("--changed", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--fit-windows", type=int, default=FIT_WINDOWS)
    parser.add_argument("--read-windows", type=int, default=16)
    parser.add_argument("--continuations", type=int, default=16)
    parser.add_argument("--lambada", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    add_options(parser)
    return parser.parse_args()


PARTS = {
    "exit": (exit_part, EXIT_HEAD, exit_line),
    "speculate": (speculate_part, SPECULATE_HEAD, speculate_line),
}


def main() -> None:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    codec = FolderCodec(args.model)
    model = load(args.model, getattr(torch, args.dtype)).to(args.device)
    said = []
    for name in args.part:
        run, head, line = PARTS[name]
        found = run(model, codec, args)
        facts = {"device": args.device, "dtype": args.dtype, "model": args.model.name}
        (args.out / f"{name}.json").write_text(json.dumps({**facts, **found}, indent=1) + "\n")
        said += [f"## {name}", "", head, *map(line, found["rows"]), ""]
        (args.out / "early_generation.md").write_text("\n".join(said))
    print("\n".join(said))


if __name__ == "__main__":
    main()
