"""Checkpoint -> a folder with model.onnx and KV cache, for onnxruntime and onnxruntime-genai."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shortstack import activations, child, families
from shortstack.activations import refuse_float16
from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint, hash_files
from shortstack.disk import require_space
from shortstack.errors import ShortstackError, require, unknown
from shortstack.export import importance
from shortstack.export.importance import observe
from shortstack.export.importance_file import CHANNELS
from shortstack.export.onnx_builders import AUTO, BUILDERS, Builder, choose
from shortstack.export.removed import check_removed
from shortstack.families import check_rope, rope_parameters
from shortstack.footprint import PROCESS_BYTES
from shortstack.progress import OnProgress, silent

REVISION = 2  # 2: int4 is rounded for the inputs that calibration text makes
MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
SCRATCH = ".scratch"
TIMEOUT_S = 24 * 3600.0
DEFAULT_CONTEXT = 2048
ROUNDED_AT_ONCE = 1 << 22
"""Weights that onnx_rounding.py rounds at a time, all threads together."""
ROUNDING_BYTES = 32
"""What a weight takes meanwhile, in temporary arrays."""
ROTATIONS = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotations that are a table; transformers computes it."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Precision:
    """Bits of most weights, and the options in force where the spec names none."""

    bits: int
    defaults: tuple[tuple[str, str], ...] = ()


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(32),
    "fp16": Precision(16),
    "int8": Precision(8, (("block", "32"), ("activations", "float32"))),
    "int4": Precision(
        4,
        (
            ("block", "32"),
            ("imatrix", "yes"),
            ("head", "int4"),
            ("wide", "none"),
            ("activations", "float32"),
        ),
    ),
}
BLIND = {"head": "int8", "wide": "down"}
"""Defaults of int4 with imatrix=no: rounding that knows no inputs needs these bits."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "builder": (AUTO, *BUILDERS),
    "block": ("16", "32", "64", "128"),
    "imatrix": ("yes", "no"),
    "head": ("int4", "int8"),
    "wide": ("none", "down", "down+qkv"),
    "activations": ("float32", "float16"),
}
"""`builder`: what makes the graph (onnx_builders.py); `block`: weights that share a scale;
`imatrix`: whether 4 bits are rounded for the inputs that calibration text makes (onnx_rounding.py);
`head`: type of the output matrix and of the embedding; `wide`: projections of an int4 model with 8
bits; `activations`: type of all that is no code: activations, scales, KV cache. float16 is for
CUDA, where onnxruntime has no GroupQueryAttention in float32.

Measured on SmolLM2-135M, KL to float32, with imatrix: all int4 0.23; head int8 or down int8 0.17;
both 0.13. Without: all int4 0.37; head and down int8 0.18.
"""


def settings(spec: ExportSpec) -> dict[str, str]:
    """The options in force: the precision's defaults, overridden by the spec's.

    Raises ShortstackError for a precision that is not there.
    """
    if spec.precision not in PRECISIONS:
        raise unknown("ONNX precision", spec.precision, PRECISIONS)
    given = {name: value for name, value in spec.options if name != "builder"}
    blind = BLIND if given.get("imatrix") == "no" else {}
    return {**dict(PRECISIONS[spec.precision].defaults), **blind, **given}


def is_half(spec: ExportSpec) -> bool:
    """Whether the graph computes in float16."""
    return spec.precision == "fp16" or settings(spec).get("activations") == "float16"


def check(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    require(("onnx_ir", "onnxruntime"), "onnx", "the export to ONNX")
    chosen = settings(spec)
    check_rope(checkpoint.text, ROTATIONS)
    allowed = {"builder": AUTO, **dict(PRECISIONS[spec.precision].defaults)}
    for option, value in spec.options:
        if option not in OPTIONS:
            raise unknown("option of the onnx export", option, OPTIONS)
        if value not in OPTIONS[option]:
            raise unknown(f"value of {option}", value, OPTIONS[option])
        if option not in allowed:
            raise ShortstackError(
                f"{spec.precision} has no option {option!r}; it has: {', '.join(allowed)}. "
                "Leave it out."
            )
    block = int(chosen.get("block", "1"))
    for width in (checkpoint.dims["d"], checkpoint.dims["q"], checkpoint.dims["ff"]):
        if width % block:
            raise ShortstackError(
                f"block: rows of {width} cannot be cut into blocks of {block}. "
                "Choose a smaller block."
            )
    if len(checkpoint.removed["attention"]) == checkpoint.n_layers:
        raise ShortstackError(
            "no layer has attention left, an ONNX decoder needs a KV cache. Keep one layer's."
        )
    _builder(checkpoint, spec)


def _builder(checkpoint: Checkpoint, spec: ExportSpec) -> tuple[str, Builder]:
    return choose(checkpoint, spec.option("builder", AUTO) or AUTO)


def predict(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, int]:
    """Sizes from bits and block scales; RAM: the builder's, and what one matrix takes."""
    check(checkpoint, spec)
    _, builder = _builder(checkpoint, spec)
    bits = PRECISIONS[spec.precision].bits
    plain = bits in (16, 32)
    size = checkpoint.n_params * bits // 8 if plain else _quantized_bytes(checkpoint, spec)
    entry_bytes = 2 if is_half(spec) else 4
    size += 200 * checkpoint.n_layers * 50 + entry_bytes * _rotation_entries(checkpoint, spec)
    largest = max(math.prod(info.shape) for info in checkpoint.tensors.values())
    making = builder.peak_ram_bytes(checkpoint) + _writing_bytes(largest, bits)
    observing = importance.peak_ram_bytes(checkpoint) if calibrates(checkpoint, spec) else 0
    return {
        "size_bytes": size,
        "peak_ram_bytes": PROCESS_BYTES + max(making, observing),
        "disk_bytes": size + builder.disk_bytes(checkpoint),
    }


def _writing_bytes(largest: int, bits: int) -> int:
    """What the largest tensor takes while it is written, of so many weights: it and its copy in
    float32, or its codes and what rounding a part of it takes."""
    if bits == 32:
        return 8 * largest
    if bits == 16:
        return 6 * largest
    return 5 * largest + ROUNDING_BYTES * min(largest, ROUNDED_AT_ONCE)


def _rotation_entries(checkpoint: Checkpoint, spec: ExportSpec) -> int:
    """Entries of the tables of cosines and sines."""
    context = context_tokens(checkpoint, spec) or DEFAULT_CONTEXT
    return context * checkpoint.dims["head_dim"]


def _quantized_bytes(checkpoint: Checkpoint, spec: ExportSpec) -> int:
    chosen, sizes = settings(spec), checkpoint.dims
    scale = (16 if is_half(spec) else 32) / int(chosen["block"])  # a number a block
    eight, body = 8 + scale, PRECISIONS[spec.precision].bits + scale
    wide = chosen.get("wide", "none")
    n_wide = checkpoint.n_layers * (
        ("down" in wide) * sizes["d"] * sizes["ff"]
        + ("qkv" in wide) * sizes["d"] * (sizes["q"] + 2 * sizes["kv"])
    )
    table = sizes["vocab"] * sizes["d"]
    n_body = checkpoint.n_params - table * (1 if checkpoint.tied else 2) - n_wide
    small_head = chosen.get("head") == "int4"
    tables = (body if small_head else eight) * (1 if checkpoint.tied else 2)
    return int((n_body * body + n_wide * eight + table * tables) / 8)


def context_tokens(checkpoint: Checkpoint, spec: ExportSpec) -> int | None:
    """The model's context; of a rotation that changes beyond a length, that length."""
    longest = families.context_tokens(checkpoint.config, windowed=True)
    if rope_parameters(checkpoint.text)["rope_type"] == "longrope":
        return _unchanged_context(checkpoint, longest)
    return longest


def _unchanged_context(checkpoint: Checkpoint, longest: int | None) -> int | None:
    """Up to where longrope uses its short factors: a graph has one table."""
    text = checkpoint.text
    given = rope_parameters(text).get("original_max_position_embeddings")
    limit = given or text.get("original_max_position_embeddings")
    return min(int(limit), longest or int(limit)) if limit else longest


def calibrates(checkpoint: Checkpoint, spec: ExportSpec) -> bool:
    """For importance, and before anything computes in float16."""
    return is_half(spec) or wants_importance(spec)


def wants_importance(spec: ExportSpec) -> bool:
    return settings(spec).get("imatrix") == "yes"


def export(
    checkpoint: Checkpoint,
    spec: ExportSpec,
    out: Path,
    *,
    calibration: Sequence[Sequence[int]] = (),
    progress: OnProgress = silent,
) -> Artifact:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer's files into `out`."""
    check(checkpoint, spec)
    check_removed(checkpoint)
    require_space(out, predict(checkpoint, spec)["disk_bytes"])
    name, _ = _builder(checkpoint, spec)
    try:
        notes, channels = _calibrate(checkpoint, spec, calibration, out / SCRATCH)
        made = child.call(
            "shortstack.export.onnx_make:make_here",
            {
                "checkpoint": str(checkpoint.path),
                "out": str(out),
                "builder": name,
                "precision": spec.precision,
                "chosen": settings(spec),
                "context": context_tokens(checkpoint, spec) or DEFAULT_CONTEXT,
                "importance": str(channels) if channels else None,
            },
            timeout_s=TIMEOUT_S,
            what=f"building the {spec.precision} ONNX model",
            progress=progress,
            env=QUIET,
        )
    finally:
        shutil.rmtree(out / SCRATCH, ignore_errors=True)
    for file in checkpoint.tokenizer_files:
        shutil.copyfile(file, out / file.name)
    return Artifact(
        path=out,
        spec=spec,
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=sum((out / file).stat().st_size for file in (MODEL, DATA)),
        weight_bytes_per_token=made["weight_bytes_per_token"],
        sha256=hash_files(out, [MODEL, DATA, CONFIG]),
        source_sha256=checkpoint.sha256,
        notes=(
            f"graph by {name}",
            *_notes(checkpoint, spec),
            *notes,
            *_unweighted_notes(made["unweighted"]),
            *_codes_notes(made["kept_codes"], made["rounded"]),
        ),
        matmul_params=made["matmul_params"],
        head_params=made["head_params"],
    )


def _calibrate(
    checkpoint: Checkpoint, spec: ExportSpec, windows: Sequence[Sequence[int]], scratch: Path
) -> tuple[tuple[str, ...], Path | None]:
    """Run the model on calibration text; returns notes and the file of importance, if one is made.

    Raises ShortstackError where float16 would turn an activation into infinity, and for missing
    text.
    """
    if wants_importance(spec):
        if not windows:
            raise ShortstackError(
                f"{spec.precision}: no calibration text to weigh input channels by. "
                "Give calibration windows, or imatrix=no."
            )
        scratch.mkdir()
        channels = scratch / CHANNELS
        seen = observe(checkpoint, windows, channels=channels)
        _refuse_overflow(seen, spec)
        weighed = f"importance from {seen.n_tokens} tokens of calibration text"
        return (*activations.notes(seen), weighed), channels
    if not is_half(spec) or not windows:
        return (), None
    seen = observe(checkpoint, windows)
    _refuse_overflow(seen, spec)
    return activations.notes(seen), None


def _refuse_overflow(seen: activations.ActivationRange, spec: ExportSpec) -> None:
    """Raise ShortstackError where float16 would turn an activation into infinity."""
    if spec.precision == "fp16":
        refuse_float16(seen.anywhere, "fp16 in ONNX", "Export to fp32, int8 or int4.")
    elif is_half(spec):
        what = f"{spec.precision} in ONNX with float16 activations"
        refuse_float16(seen.anywhere, what, "Export with activations=float32.")


def _unweighted_notes(names: Sequence[str]) -> list[str]:
    """Matrices of the graph that no importance was found for: none, in every builder we know."""
    return [f"{len(names)} matrices rounded without importance, {names[0]} first"] if names else []


def _codes_notes(n_kept: int, rounded: Sequence[str]) -> list[str]:
    """Which matrices have the codes and steps of the checkpoint's sidecar."""
    found = [f"{n_kept} matrices keep their row codes: weights are codes x steps, exactly"]
    if rounded and n_kept:
        found.append(f"{len(rounded)} matrices without codes are rounded, {rounded[0]} first")
    return found if n_kept else []


def _notes(checkpoint: Checkpoint, spec: ExportSpec) -> list[str]:
    chosen = ", ".join(f"{name} {value}" for name, value in settings(spec).items())
    context = context_tokens(checkpoint, spec)
    longest = families.context_tokens(checkpoint.config, windowed=True)
    shorter = f"context_length is {context}, not {longest}: beyond it the rotation is another"
    return [*([chosen] if chosen else []), *([shorter] if context != longest else [])]
