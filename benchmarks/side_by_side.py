"""`shortstack bench` against llama-bench on the same file, taking turns; or against genai's loop.

    python -m benchmarks.side_by_side MODEL... [--device cuda:0] [--llama-bench PATH]
        [--prompt-tokens 512] [--decode-tokens 128] [--threads N] [--rounds 6] [--json FILE]

MODEL: a .gguf file (llama.cpp, against llama-bench) or an ONNX folder (onnxruntime-genai, against
a plain loop over its Generator). Each round runs both once, in fresh processes, who goes first
alternating; ours begins, and what its record says of the runtime sets llama-bench's options.
Prefill is the prompt into an empty cache, decode single tokens behind it (llama-bench: `-d`, the
cache filled first). Both sides warm up: llama-bench with the whole prompt or one token (on a card
with two runs more), genai's loop with the whole prompt and 8 tokens.

What stays unlike: our clock includes the logits' way to the host, and of decode an argmax there;
llama-bench waits for the device and reads no logits. llama-bench keeps no more of the cache than
a sliding window needs (`swa_full`), ours all of it. genai chooses its tokens itself, on a card
there; its prefill ends there, as ours, when the logits are on the host.

llama-bench's prompt that counts comes after others like it, and on a card, the fourth in a row, is
a graph that llama.cpp replays; ours follows decode steps, as a request does. "Again" is our
session's last of as many in a row.

Prints, a row for each model, medians over rounds and the median of ours / theirs, with a bootstrap
over rounds; `--json` keeps every round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shortstack.devices.host import libraries, usable_cores
from shortstack.devices.stats import median, paired_ratio_interval
from shortstack.errors import ShortstackError, one_line
from shortstack.runtimes.capabilities import device_kind
from shortstack.runtimes.llama_cpp import FLASH_ATTENTION

FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")
AGAIN = "again_tokens_per_s"
"""Of our session's prompts in a row, the last; held against llama-bench's prefill."""
KINDS = ("cpu", "cuda")
TIMEOUT_S = 900
ALL_LAYERS = 999
REPETITIONS = {"cpu": 1, "cuda": 3}
"""Of each of llama-bench's tests; the last one counts, all are kept. On a card its second run of a
prompt records a CUDA graph and pays for it (ggml-cuda.cu: a graph is captured when it comes twice
in a row, as llama-bench's warm-up makes it); only from the third on is the graph replayed."""
LOOPS = Path(__file__).with_name("loops.py")
Figures = dict[str, Any]
"""FIGURES, and what else a side has to tell of a round."""
Round = dict[str, Any]


def ours(model: Path, runtime: str, asked: argparse.Namespace) -> Figures:
    """One trial of `shortstack bench`, with what the runtime says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench"
        words = [sys.executable, "-m", "shortstack", "bench", model, "-o", out]
        words += ["--runtime", runtime, "--device", asked.device, "--threads", asked.threads]
        words += ["--prompt-tokens", asked.prompt_tokens, "--decode-tokens", asked.decode_tokens]
        words += ["--repeats", 1, "--memory-repeats", 0, "--no-ceilings", "--quiet"]
        told = _run(words, may_fail=True)
        file = out / "bench.json"
        if not file.is_file():
            raise ShortstackError(f"shortstack bench: {_last_line(told.stderr)}")
        (found,) = json.loads(file.read_text(encoding="utf-8"))["measurements"]
    if found["failure"] is not None:
        raise ShortstackError(f"shortstack bench: {found['failure']['message']}")
    (trial,) = found["trials"]
    steps = trial["decode_step_s"]
    rates = (asked.prompt_tokens / trial["prefill_s"], len(steps) / sum(steps))
    named = ("prefill_s", "decode_step_s", "warmup", "device_before", "device_after")
    return {
        **dict(zip(FIGURES, rates, strict=True)),
        **{name: trial[name] for name in named},
        "runtime_info": found["runtime_info"],
    }


def ours_again(model: Path, asked: argparse.Namespace) -> Figures:
    """Prompts in a row in a session of ours, in a process of its own."""
    times = 1 + REPETITIONS[device_kind(asked.device)[0]]  # one for llama-bench's warm-up
    words = [sys.executable, LOOPS, "prompts", model, "--device", asked.device]
    words += ["--prompt-tokens", asked.prompt_tokens, "--threads", asked.threads]
    words += ["--times", times]
    found: Figures = json.loads(_run(words).stdout)
    return found


def llama_bench_words(device: str, info: Mapping[str, Any]) -> list[str]:
    """llama-bench's options that repeat what our session did, by its `info`.

    Left at its default, which is ours too: how the file is loaded (auto: mapped where the device
    reads host memory), and flash attention where ours is auto; `_check_alike` looks at what it
    took. On the CPU neither products nor cache go to a card that is there.
    """
    words = ["-b", info["n_batch"], "-ub", info["n_ubatch"]]
    if info["flash_attention"] != "auto":
        words += ["-fa", info["flash_attention"]]
    words += ["-ctk", info["kv_cache"].lower(), "-ctv", info["kv_cache"].lower()]
    words += ["--repack", int(info["extra_buffers"])]
    kind, number = device_kind(device)
    if kind == "cpu":
        words += ["-ngl", 0, "-nkvo", 1, "-nopo", 1]
    else:
        words += ["-ngl", ALL_LAYERS, "-dev", f"CUDA{number}", "-sm", "none", "-mg", 0]
    return [str(word) for word in words]


def llama_bench(model: Path, asked: argparse.Namespace, info: Mapping[str, Any]) -> Figures:
    """Each test of llama-bench in a process of its own; the last of its REPETITIONS."""
    prompt, decode = asked.prompt_tokens, asked.decode_tokens
    always = ["-t", asked.threads, "-r", REPETITIONS[device_kind(asked.device)[0]], "-o", "json"]
    tests = (("-p", prompt, "-n", 0), ("-p", 0, "-n", decode, "-d", prompt))
    made = []
    for test in tests:
        words = [asked.llama_bench, "-m", model, *test, *always]
        told = _run([*words, *llama_bench_words(asked.device, info)])
        made += json.loads(told.stdout)
    for one in made:
        _check_alike(one, info)
        one["model_filename"] = Path(one["model_filename"]).name
    figures = {name: one["samples_ts"][-1] for name, one in zip(FIGURES, made, strict=True)}
    return {**figures, "tests": made}


def _check_alike(test: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Raise ShortstackError where llama-bench says that it ran with other settings than we."""
    wanted = {
        **{name: info[name] for name in ("n_batch", "n_ubatch", "threads")},
        "type_k": info["kv_cache"].lower(),
        "flash_attn": FLASH_ATTENTION[info["flash_attention"]],
    }
    for name, ours in wanted.items():
        theirs = test["n_threads" if name == "threads" else name]
        if theirs != ours:
            raise ShortstackError(
                f"llama-bench ran with {name} {theirs}, ours with {ours}. "
                "Take the llama-bench of the llama.cpp that llama-cpp-python has."
            )


def genai(model: Path, asked: argparse.Namespace) -> Figures:
    """genai's own loop, in a process of its own."""
    words = [sys.executable, LOOPS, "genai", model, "--device", asked.device]
    words += ["--prompt-tokens", asked.prompt_tokens, "--decode-tokens", asked.decode_tokens]
    found: Figures = json.loads(_run([*words, "--threads", asked.threads]).stdout)
    return found


def rounds(model: Path, asked: argparse.Namespace, made: list[Round]) -> None:
    """Append each round to `made` as it ends. Raises ShortstackError where a side fails."""
    gguf = is_gguf(model)
    info: dict[str, Any] = {}

    def mine() -> Figures:
        found = ours(model, "llama.cpp" if gguf else "onnxruntime-genai", asked)
        if gguf:
            found |= ours_again(model, asked)
        info.update(found["runtime_info"])
        return found

    def other() -> Figures:
        return llama_bench(model, asked, info) if gguf else genai(model, asked)

    sides: tuple[tuple[str, Callable[[], Figures]], ...] = (("ours", mine), ("theirs", other))
    for number in range(asked.rounds):
        turn = sides if number % 2 == 0 else sides[::-1]
        made.append({"first": turn[0][0], **{name: side() for name, side in turn}})
        told = "  ".join(
            f"{n} {made[-1]['ours'][n]:.1f} {made[-1]['theirs'][n]:.1f}" for n in FIGURES
        )
        print(f"{model.name}, round {number + 1}: {told}", file=sys.stderr, flush=True)


def row(model: str, pair: tuple[str, str], made: list[Round]) -> str:
    """A line of the table: medians of both sides, the median of the rounds' ratios."""
    cells = [model, *pair]
    for name in FIGURES:
        mine, other = ([one[side][name] for one in made] for side in ("ours", "theirs"))
        ratio = paired_ratio_interval(mine, other)
        cells += [f"{median(mine):,.1f}", f"{median(other):,.1f}"]
        cells += [f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"]
    if all(AGAIN in one["ours"] for one in made):
        mine, other = (
            [one["ours"][AGAIN] for one in made],
            [one["theirs"][FIGURES[0]] for one in made],
        )
        ratio = paired_ratio_interval(mine, other)
        cells += [
            f"{median(mine):,.1f}",
            f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        ]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| model | runtime | against | prefill, tokens/s: ours | theirs | ratio (95 %) \
| decode, tokens/s: ours | theirs | ratio (95 %) | prefill again: ours | ratio to theirs |
|---|---|---|---:|---:|---|---:|---:|---|---:|---|"""


def is_gguf(model: Path) -> bool:
    return model.suffix == ".gguf"


def compare(asked: argparse.Namespace) -> list[str]:
    """Print the table, a row as soon as it is known; give back what failed."""
    kept: dict[str, Any] = {
        **{name: getattr(asked, name) for name in ("device", "threads", "prompt_tokens")},
        **{"decode_tokens": asked.decode_tokens, "libraries": libraries(), "models": []},
    }
    failed = []
    print(HEAD)
    for model in asked.models:
        pair = ("llama.cpp", "llama-bench") if is_gguf(model) else ("onnxruntime-genai", "its loop")
        made: list[Round] = []
        failure = None
        try:
            rounds(model, asked, made)
        except ShortstackError as error:  # the other models' turns are not lost
            failure = str(error)
            failed.append(f"{model.name}: {failure}")
        if made:
            print(row(model.name, pair, made), flush=True)
        one = {"model": model.name, "runtime": pair[0], "against": pair[1], "failure": failure}
        kept["models"].append({**one, "rounds": made})
        if asked.json is not None:
            asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return failed


def _run(words: list[Any], *, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    said = [str(word) for word in words]
    name = Path(said[0]).name
    try:
        done = subprocess.run(said, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        why = f"{name} ran longer than {TIMEOUT_S} s. Ask for fewer tokens."
        raise ShortstackError(why) from None
    if done.returncode and not may_fail:
        raise ShortstackError(f"{name} ended with {done.returncode}: {_last_line(done.stderr)}")
    return done


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return one_line(lines[-1], 300) if lines else "it gave no reason"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every round's raw figures")
    return parser


def checked(parser: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for; ends with a message where that cannot be compared."""
    asked = parser.parse_args(words)
    try:
        kind, _ = device_kind(asked.device)
    except ShortstackError as error:
        parser.error(str(error))
    if kind not in KINDS:
        parser.error(f"{asked.device}: llama-bench's options are known here for cpu and cuda alone")
    for name in ("prompt_tokens", "decode_tokens", "threads", "rounds"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(asked, name)}, the least is 1")
    for model in asked.models:
        if not is_gguf(model) and not (model / "genai_config.json").is_file():
            parser.error(f"{model} is neither a .gguf file nor a folder with genai_config.json")
    named = asked.llama_bench is not None and os.access(asked.llama_bench, os.X_OK)
    if any(map(is_gguf, asked.models)) and not named:
        parser.error("name llama-bench of the same llama.cpp: --llama-bench PATH")
    return asked


def main() -> None:
    asked = checked(arguments())
    failed = compare(asked)
    for line in failed:
        print(line, file=sys.stderr)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
