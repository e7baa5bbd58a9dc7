"""`shortstack bench` against llama-bench on the same file, taking turns; or against genai's loop.

    python -m benchmarks.side_by_side MODEL.gguf --llama-bench PATH [--prompt-tokens 512]
        [--decode-tokens 128] [--threads N] [--rounds 6]
    python -m benchmarks.side_by_side MODEL_ONNX_FOLDER [...]

Each round runs both once, in fresh processes, who goes first alternating. Prefill is the prompt
into an empty cache, decode single tokens behind it (llama-bench: `-d`, the cache filled first).
genai's own figures are those of its Generator on as many threads (left alone it takes one of two
here): append_tokens, then generate_next_token, greedy.
Prints the median over rounds of ours / theirs, with a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shortstack.devices.host import usable_cores
from shortstack.devices.stats import Interval, paired_ratio_interval

FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")
Figures = dict[str, float]


def ours(asked: argparse.Namespace, runtime: str) -> Figures:
    """One trial of `shortstack bench`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench"
        subprocess.run(
            [
                *(sys.executable, "-m", "shortstack", "bench", str(asked.model), "-o", str(out)),
                *("--runtime", runtime, "--repeats", "1", "--memory-repeats", "0", "--quiet"),
                *("--prompt-tokens", str(asked.prompt_tokens), "--threads", str(asked.threads)),
                *("--decode-tokens", str(asked.decode_tokens)),
            ],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        record = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    (trial,) = record["measurements"][0]["trials"]
    steps = trial["decode_step_s"]
    rates = (asked.prompt_tokens / trial["prefill_s"], len(steps) / sum(steps))
    return dict(zip(FIGURES, rates, strict=True))


def llama_bench(asked: argparse.Namespace) -> Figures:
    """One repetition of each test of llama-bench, in a process each."""
    prompt, decode = str(asked.prompt_tokens), str(asked.decode_tokens)
    tests = (("-p", prompt, "-n", "0"), ("-p", "0", "-n", decode, "-d", prompt))
    rates = []
    for test in tests:
        words = [asked.llama_bench, "-m", asked.model, *test, "-t", asked.threads, "-r", 1]
        words += ["-o", "json", "-ngl", 0]
        done = subprocess.run(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        rates.append(json.loads(done.stdout)[0]["avg_ts"])
    return dict(zip(FIGURES, rates, strict=True))


def genai(asked: argparse.Namespace) -> Figures:
    """genai's own loop, in a process of its own."""
    words = ["--prompt-tokens", asked.prompt_tokens, "--decode-tokens", asked.decode_tokens]
    words += ["--threads", asked.threads]
    done = subprocess.run(
        [sys.executable, __file__, str(asked.model), "--genai-loop", *map(str, words)],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: Figures = json.loads(done.stdout)
    return found


def genai_loop(asked: argparse.Namespace) -> Figures:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(asked.model))
    options = {"intra_op_num_threads": asked.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    length = asked.prompt_tokens + asked.decode_tokens + 1
    prompt = np.random.default_rng(0).integers(100, 10_000, asked.prompt_tokens, np.int32)

    def run(n_decode: int) -> tuple[float, float]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        prefilled = time.perf_counter()
        generator.generate_next_token()
        begun = time.perf_counter()
        for _ in range(n_decode):
            generator.generate_next_token()
        return prefilled - start, time.perf_counter() - begun

    run(8)  # warm
    prefill_s, decode_s = run(asked.decode_tokens)
    rates = (asked.prompt_tokens / prefill_s, asked.decode_tokens / decode_s)
    return dict(zip(FIGURES, rates, strict=True))


def compared(asked: argparse.Namespace) -> dict[str, tuple[Interval, float, float]]:
    """Figure -> ratio of ours to theirs, our median, their median."""
    import statistics

    gguf = asked.model.suffix == ".gguf"
    sides = (
        lambda: ours(asked, "llama.cpp" if gguf else "onnxruntime-genai"),
        lambda: llama_bench(asked) if gguf else genai(asked),
    )
    seen: tuple[list[Figures], list[Figures]] = ([], [])
    for number in range(asked.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            seen[side].append(sides[side]())
        told = "  ".join(f"{n} {seen[0][-1][n]:.1f} {seen[1][-1][n]:.1f}" for n in FIGURES)
        print(f"round {number + 1}: {told}", file=sys.stderr, flush=True)
    found = {}
    for name in FIGURES:
        mine, other = ([figures[name] for figures in side] for side in seen)
        medians = statistics.median(mine), statistics.median(other)
        found[name] = (paired_ratio_interval(mine, other), *medians)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--genai-loop", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.genai_loop:
        print(json.dumps(genai_loop(asked)))
        return
    if asked.model.suffix == ".gguf" and not (
        asked.llama_bench and os.access(asked.llama_bench, os.X_OK)
    ):
        parser.error("name llama-bench of the same llama.cpp: --llama-bench PATH")
    theirs = "llama-bench" if asked.model.suffix == ".gguf" else "genai"
    print(f"| {asked.model.name} | ours | {theirs} | ours / {theirs} (95 %) |\n|---|---:|---:|---|")
    for name, (ratio, mine, other) in compared(asked).items():
        interval = f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        print(f"| {name} | {mine:.1f} | {other:.1f} | {interval} |")


if __name__ == "__main__":
    main()
