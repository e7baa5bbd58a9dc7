"""Perplexity, speed and memory of ways to heal one cut, at equal tokens.

    python benchmarks/healing.py MODEL --text T [--general G] [--drop 8] [--tokens 60000]
        [--kinds all:kl,all:ce,lora:8:kl,neighbours:kl,streamline:mse,streamline:lm] [--threads N]

The layers that go are those of least influence (ShortGPT); LLM-Streamline chooses its own run.
Perplexity is on selection text, of which nothing was trained on; test text is left alone. Each kind
runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KINDS = "all:kl,all:ce,lora:8:kl,neighbours:kl,streamline:none,streamline:mse,streamline:lm"
COLUMNS = ("perplexity_before", "perplexity_after", "best_step", "tokens_per_s", "peak_bytes")


def shortstack(*arguments: object, threads: int) -> dict[str, Any]:
    """Run a command; its answer."""
    code = (
        f"import sys, torch; torch.set_num_threads({threads}); from shortstack.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(kind: str, asked: argparse.Namespace, cut: Path, out: Path) -> dict[str, Any]:
    common: list[object] = ["--text", asked.text, "--tokens", asked.tokens, "-o", out]
    common += ["--window-tokens", asked.window_tokens, "--batch-windows", asked.batch_windows]
    common += ["--selection-windows", asked.selection_windows, "--dtype", asked.dtype]
    if asked.general:
        common += ["--general", asked.general]
    what, _, loss = kind.rpartition(":")
    if what == "streamline":
        choice = ("--replacement", "none") if loss == "none" else ("--objective", loss)
        rate = ("--rate", asked.streamline_rate)
        return shortstack(
            *("streamline", asked.model, "--drop", asked.drop, *choice, *rate, *common),
            threads=asked.threads,
        )
    rate = ("--rate", asked.lora_rate if what.startswith("lora") else asked.rate)
    return shortstack(
        *("heal", cut, "--teacher", asked.model, "--train", what, "--loss", loss, *rate, *common),
        threads=asked.threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--general")
    parser.add_argument("--plan-text", default="spdx", help="What influence is measured on.")
    parser.add_argument("--drop", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--batch-windows", type=int, default=8)
    parser.add_argument("--selection-windows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--lora-rate", type=float, default=2e-3)
    parser.add_argument("--streamline-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    print(f"| kind | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        plan, cut = Path(folder) / "plan.json", Path(folder) / "cut"
        choice = ("--drop", asked.drop, "--method", "influence", "--text", asked.plan_text)
        shortstack("plan", asked.model, *choice, "-o", plan, threads=asked.threads)
        shortstack("prune", asked.model, "--plan", plan, "-o", cut, threads=asked.threads)
        for kind in asked.kinds.split(","):
            facts = measure(kind, asked, cut, Path(folder) / kind.replace(":", "-"))
            cells = " | ".join(f"{facts[name]:.5g}" for name in COLUMNS)
            print(f"| {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
