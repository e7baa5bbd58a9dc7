"""What each runtime offers beyond one sequence on the CPU, and the refusal of what it does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shortstack.errors import ShortstackError, unknown

DEVICE = re.compile(r"(cpu)|(cuda|metal|vulkan|rocm):(\d+)")
NUMBER = re.compile(r"\d+(\.\d+)?")
SWITCH = ("auto", "on", "off")


@dataclass(frozen=True)
class Capability:
    """One row of the table. The first value of an option is its default."""

    devices: tuple[str, ...]
    """Kinds: cpu, cuda, ..."""
    batch: bool
    """Whether it runs more than one sequence side by side."""
    batch_at_depth: bool = True
    """Whether a batch takes prompts behind a cache that holds something."""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of an option -> the words it takes; `N` stands for a whole number, `MB` for any
    number, `X` for one of at least 1, `FILE` for a path."""


FREE: Mapping[str, Callable[[str], bool]] = {
    "N": str.isdigit,
    "MB": lambda value: bool(NUMBER.fullmatch(value)),
    "X": lambda value: bool(NUMBER.fullmatch(value)) and float(value) >= 1,
    "FILE": bool,
}
"""Words that stand for others -> whether a value is one of these."""

CAPABILITIES: Mapping[str, Capability] = {
    "llama.cpp": Capability(
        devices=("cpu", "cuda", "metal", "vulkan", "rocm"),
        batch=True,
        options={
            "gpu_layers": ("all", "N"),
            "flash_attention": SWITCH,
            "kv_type": ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        },
    ),
    "onnxruntime": Capability(devices=("cpu", "cuda"), batch=True, batch_at_depth=False),
    "onnxruntime-genai": Capability(devices=("cpu", "cuda"), batch=False),
    "pytorch": Capability(
        devices=("cpu", "cuda"),
        batch=True,
        options={
            "dtype": ("float32", "bfloat16", "float16"),
            "cuda_graph": ("off", "on"),
            "quantize": ("none", "bnb-int8", "bnb-nf4", "torchao-int4", "awq-int4"),
        },
    ),
    "pytorch-packed": Capability(
        devices=("cpu", "cuda"),
        batch=True,
        options={
            "dtype": ("bfloat16", "float32"),
            "form": ("auto", "direct", "lean", "int8", "stream", "plain"),
            "head": ("auto", "direct", "lean", "int8", "stream", "plain"),
            "workers": ("auto", "N"),
            "plan": ("none", "FILE"),
            "memory_budget_mb": ("none", "MB"),
            "max_slowdown": ("none", "X"),
            "cuda_graph": ("off", "on"),
        },
    ),
}
"""All of them but pytorch-packed's `stream` ran on H100s or H200s (docs/cards.md, docs/harness.md,
docs/packed_runtime.md; tests/runtimes/test_*_card.py run there)."""


COMPUTES_IN = {"bnb-int8": "float16", "torchao-int4": "bfloat16", "awq-int4": "float16"}
"""Weights of pytorch -> the only type of activations that their kernel takes. bitsandbytes casts
others at every layer, and warns every time."""
CUDA_ALONE = frozenset({"torchao-int4", "awq-int4"})
"""Weights of pytorch whose kernel is for CUDA cards."""


def device_kind(device: str) -> tuple[str, int]:
    """(kind, number) of an id such as `cpu` or `cuda:1`; `cuda` is its first.

    Raises ShortstackError for what is no device id.
    """
    found = DEVICE.fullmatch(device if ":" in device or device == "cpu" else f"{device}:0")
    if found is None:
        raise ShortstackError(
            f"{device!r} is no device. Name cpu, cuda:0, ...; shortstack doctor lists them."
        )
    return (found[1], 0) if found[1] else (found[2], int(found[3]))


def check(runtime: str, device: str, batch: int, options: Mapping[str, str]) -> None:
    """Raise ShortstackError, before anything is opened, for what `runtime` cannot do."""
    offered = CAPABILITIES[runtime]
    kind, _ = device_kind(device)
    if kind not in offered.devices:
        raise ShortstackError(
            f"{runtime} does not run on {kind}. It runs on: {', '.join(offered.devices)}."
        )
    if batch > 1 and not offered.batch:
        able = ", ".join(name for name, row in CAPABILITIES.items() if row.batch)
        raise ShortstackError(
            f"{runtime} runs one sequence at a time, a batch of {batch} is asked for. "
            f"Runtimes with batches: {able}."
        )
    for name, value in options.items():
        _check_option(runtime, offered, name, value)


def check_together(runtime: str, device: str, options: Mapping[str, str]) -> None:
    """Raise ShortstackError for options that are fine one by one, but not here or not together."""
    kind, _ = device_kind(device)
    if runtime == "pytorch-packed":
        _check_packed(kind, device, options)
    if runtime != "pytorch":
        return
    dtype, word = options.get("dtype", "float32"), options.get("quantize", "none")
    graph = options.get("cuda_graph", "off") == "on"
    if graph and kind != "cuda":
        raise ShortstackError(
            f"cuda_graph=on is for CUDA cards, {device} is asked for. Leave it out, or name cuda:0."
        )
    if graph and word == "bnb-int8":
        raise ShortstackError(
            "cuda_graph=on does not go with quantize=bnb-int8: it looks for outliers on the host "
            "at every step. Take bnb-nf4, torchao-int4 or awq-int4, or leave one of them out."
        )
    if word in CUDA_ALONE and kind != "cuda":
        raise ShortstackError(
            f"quantize={word} is for CUDA cards, {device} is asked for. Take bnb-int8 or bnb-nf4."
        )
    needed = COMPUTES_IN.get(word, dtype)
    if dtype != needed:
        raise ShortstackError(
            f"quantize={word} computes in {needed} alone, dtype is {dtype}. Add: "
            f"--option dtype={needed}"
        )


def _check_packed(kind: str, device: str, options: Mapping[str, str]) -> None:
    plan = options.get("plan", "none")
    if plan != "none":
        from shortstack.packed.plan_file import read_plan

        read_plan(Path(plan))  # refuses what is not there or no plan, before anything is measured
    if kind != "cuda" and options.get("cuda_graph", "off") == "on":
        raise ShortstackError(
            f"cuda_graph=on is for CUDA cards, {device} is asked for. Leave it out, or name cuda:0."
        )
    if kind == "cuda" and "stream" in (options.get("form"), options.get("head")):
        raise ShortstackError(
            "form=stream is decoded on the CPU and into its memory: on a card take direct or int8."
        )


def _check_option(runtime: str, offered: Capability, name: str, value: str) -> None:
    if name not in offered.options:
        if not offered.options:
            raise ShortstackError(f"{runtime} has no options, {name!r} is given. Leave it out.")
        raise unknown(f"option of {runtime}", name, offered.options)
    words = offered.options[name]
    if value not in words and not any(word in FREE and FREE[word](value) for word in words):
        raise ShortstackError(
            f"{runtime}: {name} is {value!r}, it must be one of: {', '.join(words)}."
        )


def check_batch_at_depth(runtime: str) -> None:
    """Raise ShortstackError where a batch takes no prompt behind a filled cache."""
    if not CAPABILITIES[runtime].batch_at_depth:
        raise ShortstackError(
            f"{runtime} takes no batch of prompts behind a filled cache. "
            "Ask for batch 1 or depth 0."
        )
