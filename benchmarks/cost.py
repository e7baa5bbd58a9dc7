"""What scoring and healing cost, and how that grows with depth: one width, several depths.

    python -m benchmarks.cost --layers 8 16 32 [--device cpu|cuda] [--tokens 16384] [--threads N]

Random weights of SmolLM2-135M's width (576, 9 heads of 3 keys, 49,152 tokens); a quarter of the
layers goes. Scoring leaves every layer out once over 8 windows; healing is one KL step after the
other towards the full model. Each measurement runs in a process of its own: tokens/s of the work
itself, and peak memory (CUDA's allocator, or anonymous memory) with everything it takes to start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
WINDOW, SCORED_WINDOWS = 512, 8


def make(folder: Path, n_layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=n_layers, dtype="bfloat16", **SHAPE)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def windows(count: int) -> list[list[int]]:
    import torch

    drawn = torch.randint(
        SHAPE["vocab_size"], (count, WINDOW), generator=torch.manual_seed(1), device="cpu"
    )
    rows: list[list[int]] = drawn.tolist()
    return rows


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    from shortstack.checkpoint import Checkpoint
    from shortstack.footprint import measured
    from shortstack.prune import apply_plan, planner
    from shortstack.prune.heal.settings import HealSettings
    from shortstack.prune.heal.train import heal
    from shortstack.prune.methods import every

    torch.set_num_threads(asked.threads)
    checkpoint = Checkpoint.open(asked.folder / "model")
    drop = checkpoint.n_layers // 4
    if asked.one == "score":
        if asked.device != "cpu":
            torch.set_default_device(asked.device)
        read = windows(SCORED_WINDOWS)
        planner("perplexity")(checkpoint, drop=drop, windows=read[:1])  # imports, first kernels
        with measured() as meter:
            began = time.perf_counter()
            planner("perplexity")(checkpoint, drop=drop, windows=read)
            wall_s = time.perf_counter() - began
        peak = meter.footprint.peak_anon_bytes
        if asked.device != "cpu":
            peak = torch.cuda.max_memory_allocated()
        return {"tokens_per_s": SCORED_WINDOWS * WINDOW / wall_s, "peak_bytes": peak}
    plan = every(checkpoint, drop=drop, windows=[])
    with tempfile.TemporaryDirectory(dir=asked.folder) as work:
        for name in ("cut", "out"):
            (Path(work) / name).mkdir()
        cut = apply_plan(checkpoint, plan, Path(work) / "cut")
        settings = HealSettings(
            tokens=asked.tokens,
            window_tokens=WINDOW,
            batch_windows=asked.batch,
            device="cpu" if asked.device == "cpu" else "auto",
        )
        train = windows(max(1, asked.tokens // WINDOW))
        _, facts = heal(cut, checkpoint, train, windows(2), Path(work) / "out", settings)
    return {name: facts[name] for name in ("tokens_per_s", "peak_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="of healing")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked)))
        return
    print("| layers | work | tokens/s | peak MB |\n|---|---|---|---|", flush=True)
    for n_layers in asked.layers:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "model", n_layers)
            for work in ("score", "heal"):
                words = [*sys.argv[1:], "--folder", folder, "--one", work]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.cost", *words],
                    stdout=subprocess.PIPE,
                    check=True,
                )
                found = json.loads(done.stdout.splitlines()[-1])
                figures = f"{found['tokens_per_s']:,.0f} | {found['peak_bytes'] / 1e6:,.0f}"
                print(f"| {n_layers} | {work} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
