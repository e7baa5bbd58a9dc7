"""Write a model folder of any size with random weights: to measure with, not to read from.

    python benchmarks/make_synthetic.py OUT [--shape llama-2-7b] [--layers N] [--seed 0]
        [--gaussian]

The folder is what a hub gives for a Llama: config.json, bf16 safetensors shards of at most 2 GB
with their index, and a byte-fallback BPE tokenizer of as many tokens as the embedding has rows.
Weights are written as they are drawn; memory stays below 200 MB whatever the size. `--gaussian`
takes longer, and is for what quantizes them: codes of the others have no tails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.families import dims, expected_tensors, family_of
from shortstack.floats import to_stored
from shortstack.shards import ShardWriter, lay_out

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}
Draw = Callable[[int, int], Iterator[memoryview]]
"""(weights, seed) -> them as bfloat16, by chunks."""

MAX_SHARD_BYTES = 2 * 10**9
CHUNK_WEIGHTS = 2**22
ONE = 0x3F80
"""1.0 in bfloat16."""

KEPT_BITS, EXPONENT = 0x80FF, 0x3C00
"""Sign, lowest bit of the exponent and mantissa are drawn; the rest of the exponent makes a weight
2**-7 to 2**-5 in size, so about 0.017 in the root of the mean square."""

SIGMA = 0.02
"""Of Gaussian weights."""

SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = "▁" + string.ascii_lowercase


def config_of(shape: str, **changed: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
        **changed,
    }


def drawn(count: int, seed: int) -> Iterator[memoryview]:
    """So many random weights as bfloat16, by chunks."""
    generator = np.random.Generator(np.random.SFC64(seed))
    for start in range(0, count, CHUNK_WEIGHTS):
        size = min(CHUNK_WEIGHTS, count - start)
        words = generator.integers(0, 2**64, -(-size // 4), dtype=np.uint64)
        bits = words.view("<u2")[:size]
        bits &= KEPT_BITS
        bits |= EXPONENT
        yield bits.data.cast("B")


def gaussian(count: int, seed: int) -> Iterator[memoryview]:
    """The same, normally spread."""
    generator = np.random.Generator(np.random.SFC64(seed))
    for start in range(0, count, CHUNK_WEIGHTS):
        made = generator.standard_normal(min(CHUNK_WEIGHTS, count - start), dtype=np.float32)
        yield to_stored(np.float32(SIGMA) * made, "BF16")


def write_weights(folder: Path, config: dict[str, Any], seed: int, draw: Draw = drawn) -> int:
    """Write the shards and their index; return the bytes of all weights."""
    rows = {
        name: shape
        for name, rule, shape, _ in expected_tensors(family_of(config), dims(config))
        if not rule.optional
    }
    layout = lay_out(((n, "BF16", shape) for n, shape in rows.items()), MAX_SHARD_BYTES)
    with ShardWriter(folder, layout) as writer:
        for at, name in enumerate(writer.names):
            count = math.prod(rows[name])
            if len(rows[name]) == 1:  # the gain of a norm
                writer.write(name, [np.full(count, ONE, "<u2").data.cast("B")])
            else:
                writer.write(name, draw(count, seed * 1_000_003 + at))
    return layout.weight_bytes


def tokenizer_of(size: int) -> dict[str, Any]:
    """Bytes, letters, then pairs, triples, ... of letters, each merged from its first letters."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokens = [*SPECIAL, *byte_tokens, *LETTERS]
    pieces = (p for n in itertools.count(2) for p in itertools.product(LETTERS, repeat=n))
    wanted = max(0, size - len(tokens))
    words = ["".join(piece) for piece in itertools.islice(pieces, wanted)]
    vocabulary = {token: index for index, token in enumerate((tokens + words)[:size])}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL[0],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [f"{word[:-1]} {word[-1]}" for word in words],
        },
    }


def write_tokenizer(folder: Path, size: int) -> None:
    unknown, begin, end = SPECIAL
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    for name, content in (
        ("tokenizer.json", tokenizer_of(size)),
        ("tokenizer_config.json", settings),
    ):
        text = json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def make_synthetic(
    folder: Path,
    shape: str = "llama-2-7b",
    seed: int = 0,
    draw: Draw = drawn,
    **changed: int,
) -> int:
    """Write the folder, which must not exist; return the bytes of its weights."""
    config = config_of(shape, **changed)
    if config["vocab_size"] < len(SPECIAL) + 256 + len(LETTERS):
        raise SystemExit("The tokenizer needs 286 tokens at least: ask for a larger vocabulary.")
    folder.mkdir(parents=True)
    write_tokenizer(folder, config["vocab_size"])
    n_bytes = write_weights(folder, config, seed, draw)
    # Last, so that a folder with a config is a whole one.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return n_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--gaussian", action="store_true", help="weights normally spread")
    asked = parser.parse_args()
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists. Name a folder that does not.")
    changed = {} if asked.layers is None else {"num_hidden_layers": asked.layers}
    start = time.perf_counter()
    draw = gaussian if asked.gaussian else drawn
    n_bytes = make_synthetic(asked.out, asked.shape, asked.seed, draw, **changed)
    print(f"{n_bytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s: {asked.out}")


if __name__ == "__main__":
    main()
