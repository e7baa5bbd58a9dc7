"""Time leave-one-out scoring against the naive loop, interleaved A, B, A, B, equal numbers.

    python benchmarks/leave_one_out.py MODEL [--text spdx] [--windows 8] [--length 256]
        [--dtype auto] [--repeats 2] [--threads N]

Naive: for each candidate layer run the whole transformers model without it and take its loss.
Both score the same candidates (first and last layer protected) on the same batches and type.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from shortstack.checkpoint import Checkpoint
from shortstack.intake import open_model
from shortstack.prune.calibrate import LayerwiseModel, batches, choose_dtype
from shortstack.prune.leave_one_out import leave_one_out
from shortstack.text import open_corpus, token_windows


def naive(model: Any, parts: list[Tensor], free: range) -> list[float]:
    """Summed nats without each layer of `free`, the whole model run for every one of them."""
    layers = model.model.layers
    sums = []
    for index in free:
        model.model.layers = torch.nn.ModuleList(
            layer for at, layer in enumerate(layers) if at != index
        )
        sums.append(0.0)
        for tokens in parts:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            sums[-1] += loss.item() * tokens[:, 1:].numel()
    model.model.layers = layers
    return sums


def shared(model: LayerwiseModel, parts: list[Tensor], free: range) -> list[float]:
    sums = [0.0] * len(free)
    for tokens in parts:
        _, nats = leave_one_out(model, tokens, free)
        sums = [a + b for a, b in zip(sums, nats, strict=True)]
    return sums


def timed(work: Callable[[], list[float]]) -> tuple[list[float], dict[str, float]]:
    """Run `work`; wall and CPU seconds. On a busy machine only CPU time can be compared."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, {clock: round(seconds, 2) for clock, seconds in spent.items()}


def compare(checkpoint: Checkpoint, parts: list[Tensor], dtype: str, repeats: int) -> Any:
    free = range(1, checkpoint.n_layers - 1)
    plain = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, local_files_only=True, dtype=choose_dtype(dtype)
    ).eval()
    layerwise = LayerwiseModel(checkpoint, dtype)
    naive_s, shared_s = [], []
    for _ in range(repeats):
        expected, spent = timed(lambda: naive(plain, parts, free))
        naive_s.append(spent)
        found, spent = timed(lambda: shared(layerwise, parts, free))
        shared_s.append(spent)
    n_tokens = sum(tokens[:, 1:].numel() for tokens in parts)
    gaps = [abs(a - b) / n_tokens for a, b in zip(expected, found, strict=True)]
    ratios = [
        {clock: b[clock] / a[clock] for clock in a} for a, b in zip(naive_s, shared_s, strict=True)
    ]
    return {
        "dtype": str(layerwise.dtype),
        "tokens": n_tokens,
        "candidates": len(free),
        "threads": torch.get_num_threads(),
        "naive_s": naive_s,
        "shared_s": shared_s,
        "wall_ratio": statistics.median(ratio["wall"] for ratio in ratios),
        "cpu_ratio": statistics.median(ratio["cpu"] for ratio in ratios),
        "max_score_gap_nats": max(gaps),
        "scores": [round(nats / n_tokens, 4) for nats in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="spdx")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint = open_model(asked.model, Path(folder) / "model")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        documents = open_corpus(asked.text).calibration
        windows = token_windows(documents, encode, asked.length, asked.windows)
        result = compare(checkpoint, batches(windows), asked.dtype, asked.repeats)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
