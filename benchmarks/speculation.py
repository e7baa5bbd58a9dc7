"""Self-speculation against greedy decoding: the part `speculate` of benchmarks.early_generation."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.early_text import PROMPT_TOKENS, WINDOW_TOKENS, texts, windows
from numpy.typing import NDArray

from shortstack.evaluate import metrics
from shortstack.evaluate.codec import FolderCodec, with_prefix
from shortstack.prune.early_exit.frequent import frequent_tokens
from shortstack.prune.early_exit.skip import choose_skip
from shortstack.rows import read_rows
from shortstack.runtimes.pytorch_drafters import ExitDrafter, SkipDrafter
from shortstack.runtimes.pytorch_onednn import reordered
from shortstack.runtimes.pytorch_speculate import Drafter, Speculated, greedy, speculate

SEARCH_WINDOWS, SEARCH_TRIALS, TRAIN_ROWS = 4, 120, 600
GREEDY = "greedy"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--skip", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--draft", type=int, nargs="+", default=[3])
    parser.add_argument("--trials", type=int, default=SEARCH_TRIALS)
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--vocabulary", type=int, help="tokens that drafts may say")
    parser.add_argument("--least-probability", type=float, default=0.0)
    parser.add_argument("--reorder", action="store_true", help="matrices in oneDNN's order")


def speculate_part(model: Any, codec: FolderCodec, args: argparse.Namespace) -> dict[str, Any]:
    own, prompts = _own_and_prompts(codec, args)
    drafters = _drafters(model, codec, own, args)
    modules = {part for drafter in drafters.values() for part in drafter.modules}
    with reordered(model, *modules) if args.reorder else contextlib.nullcontext():
        rows = held(model, drafters, prompts, args)
    return {
        "rows": rows,
        "prompts": len(prompts),
        "tokens": args.tokens,
        "split": args.split,
        "vocabulary": args.vocabulary,
        "least_probability": args.least_probability,
        "reordered": args.reorder,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _own_and_prompts(
    codec: FolderCodec, args: argparse.Namespace
) -> tuple[list[str], list[list[int]]]:
    """(articles to choose by, prompts to be held against greedy decoding)."""
    own = texts(args.data, "general/wikitext2", "validation")
    half = args.prompts // 2
    if args.split == "validation":
        middle = len(own) // 2
        return own[:middle], windows(codec, own[middle:], PROMPT_TOKENS, args.prompts)
    prompts = windows(codec, texts(args.data, "general/wikitext2", "test"), PROMPT_TOKENS, half)
    passages = texts(args.data, "general/lambada", "test")[: args.prompts - half]
    return own, [*prompts, *(with_prefix(codec, text)[:PROMPT_TOKENS] for text in passages)]


def _drafters(
    model: Any, codec: FolderCodec, own: Sequence[str], args: argparse.Namespace
) -> dict[str, Drafter]:
    more = {
        "vocabulary": _vocabulary(codec, own, args) if args.vocabulary else None,
        "least_probability": args.least_probability,
    }
    drafters: dict[str, Drafter] = {}
    if args.skip:
        beginnings = windows(codec, own, PROMPT_TOKENS, SEARCH_WINDOWS)
        written = [
            [*prompt, *greedy(model, prompt, WINDOW_TOKENS, args.device)] for prompt in beginnings
        ]
    for count in args.skip:
        choice = choose_skip(model, written, count, trials=args.trials)
        title = f"without {count} layers ({', '.join(map(str, choice.skip))})"
        print(f"{title}: agreement {choice.agreement:.3f}", flush=True)
        drafters[title] = SkipDrafter(model, choice.skip, **more)
    if args.exits:
        exits = import_module("shortstack.exits.model").open_exits(args.exits, model)
        drafters |= {
            f"exit after {depth} layers": ExitDrafter(exits, depth, **more)
            for depth in exits.depths[:-1]
        }
    return drafters


def _vocabulary(
    codec: FolderCodec, articles: Sequence[str], args: argparse.Namespace
) -> NDArray[np.int64]:
    """The frequent tokens of these articles and of train rows of every set."""
    rows = (
        " ".join(str(row[key]) for key in ("text", "question", "context") if key in row)
        for file in sorted(args.data.glob("*/*/train.jsonl*"))
        for _, row in itertools.islice(read_rows(file), TRAIN_ROWS)
    )
    documents = (with_prefix(codec, text) for text in itertools.chain(articles, rows))
    return frequent_tokens(documents, args.vocabulary)


Run = tuple[str, int]
"""A drafter's title and how much it drafts; greedy decoding is ("greedy", 0)."""


def held(
    model: Any,
    drafters: dict[str, Drafter],
    prompts: Sequence[Sequence[int]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Greedy decoding and every draft on each prompt in turns, another first each time."""
    drafts = [(title, length) for title in drafters for length in args.draft]
    wall: dict[Run, list[float]] = {run: [] for run in [(GREEDY, 0), *drafts]}
    cpu: dict[Run, list[float]] = {run: [] for run in wall}
    said: dict[Run, list[Any]] = {run: [] for run in wall}

    def once(run: Run, prompt: Sequence[int], count: int) -> Any:
        if run[0] == GREEDY:
            return greedy(model, prompt, count, args.device)
        return speculate(drafters[run[0]], prompt, count, run[1], args.device)

    for run in wall:
        once(run, prompts[0], 8)  # sets libraries up
    for number, prompt in enumerate(prompts):
        for run in _from(list(wall), number):
            begun = time.perf_counter(), time.process_time()
            said[run].append(once(run, prompt, args.tokens))
            wall[run].append(time.perf_counter() - begun[0])
            cpu[run].append(time.process_time() - begun[1])
        if number % 20 == 19:
            print(f"{number + 1} of {len(prompts)} prompts", flush=True)
    wanted = said.pop((GREEDY, 0))
    rows = []
    for run in drafts:
        row = {"draft": run[0], "length": run[1]} | _facts(said[run], wanted, args.tokens)
        for name, seconds in (("speed", wall), ("cpu_speed", cpu)):
            row[name] = _speed(seconds[GREEDY, 0], seconds[run])
        rows.append(row)
        print(speculate_line(row), flush=True)
    return rows


def _from(runs: list[Run], number: int) -> Iterator[Run]:
    first = number % len(runs)
    return itertools.chain(runs[first:], runs[:first])


def _facts(
    found: Sequence[Speculated], wanted: Sequence[tuple[int, ...]], tokens: int
) -> dict[str, Any]:
    return {
        "same": sum(one.tokens == whole for one, whole in zip(found, wanted, strict=True)),
        "n": len(found),
        "accepted": sum(one.accepted for one in found) / max(1, sum(o.drafted for o in found)),
        "tokens_a_pass": tokens * len(found) / sum(one.passes + 1 for one in found),
        "least_margin": min(one.least_margin for one in found),
    }


def _speed(plain: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    whole, drafted = np.array(plain), np.array(ours)
    found = metrics.bootstrap(lambda at: float(whole[at].sum() / drafted[at].sum()), len(whole))
    return found.to_dict()


SPECULATE_HEAD = (
    "| draft | length | same output | accepted | tokens a pass | least margin | speed |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)


def speculate_line(row: dict[str, Any]) -> str:
    speed = row["speed"]
    return (
        f"| {row['draft']} | {row['length']} | {row['same']} of {row['n']} | "
        f"{row['accepted']:.2f} | {row['tokens_a_pass']:.2f} | {row['least_margin']:.1e} | "
        f"{speed['estimate']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) |"
    )
