"""What side_by_side.py measures in processes of their own besides `shortstack bench`.

    python benchmarks/loops.py genai ONNX_FOLDER --prompt-tokens 512 --decode-tokens 128
    python benchmarks/loops.py prompts FILE.gguf --prompt-tokens 512 --times 4

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.runtimes.capabilities import device_kind

WARMUP_DECODE_TOKENS = 8


def genai_loop(model: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Provider and threads as our session sets them; genai left alone takes other ones."""
    import onnxruntime_genai as og

    config = og.Config(str(model))
    options = {"intra_op_num_threads": asked.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    config.clear_providers()
    kind, number = device_kind(asked.device)
    if kind == "cuda":
        config.append_provider("cuda")
        config.set_provider_option("cuda", "device_id", str(number))
    loaded = og.Model(config)
    length = asked.prompt_tokens + asked.decode_tokens + 1
    told = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))
    most = min(10_000, told["model"]["vocab_size"])
    prompt = np.random.default_rng(0).integers(100, most, asked.prompt_tokens, np.int32)

    def run(n_decode: int) -> tuple[float, float]:
        parameters = og.GeneratorParams(loaded)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(loaded, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        if kind != "cpu":  # onnxruntime need not have waited for the card: read the result
            generator.get_logits()
        prefilled = time.perf_counter()
        generator.generate_next_token()
        generator.get_next_tokens()
        begun = time.perf_counter()
        for _ in range(n_decode):
            generator.generate_next_token()
        generator.get_next_tokens()
        return prefilled - start, time.perf_counter() - begun

    run(min(WARMUP_DECODE_TOKENS, asked.decode_tokens))
    prefill_s, decode_s = run(asked.decode_tokens)
    rates = (asked.prompt_tokens / prefill_s, asked.decode_tokens / decode_s)
    found = dict(zip(("prefill_tokens_per_s", "decode_tokens_per_s"), rates, strict=True))
    return {**found, "prefill_s": prefill_s, "decode_s": decode_s}


def prompts_in_a_row(model: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each of `--times` prompts in one session of ours, and the rate of the last."""
    from shortstack.runtimes import open_session

    with open_session(
        model,
        "llama.cpp",
        threads=asked.threads,
        context_tokens=asked.prompt_tokens,
        device=asked.device,
    ) as session:
        drawn = np.random.default_rng(0).integers(0, session.vocab_size, asked.prompt_tokens)
        prompt = drawn.tolist()
        taken = []
        for _ in range(asked.times):
            begun = time.perf_counter()
            session.prefill(prompt)
            taken.append(time.perf_counter() - begun)
    return {"again_tokens_per_s": asked.prompt_tokens / taken[-1], "again_s": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("loop", choices=("genai", "prompts"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--decode-tokens", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--times", type=int, default=1)
    asked = parser.parse_args()
    loop = genai_loop if asked.loop == "genai" else prompts_in_a_row
    print(json.dumps(loop(asked.model, asked)))


if __name__ == "__main__":
    main()
