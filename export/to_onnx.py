"""Checkpoint -> a folder with model.onnx and KV cache, built by onnxruntime-genai's builder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shortstack import families
from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint, hash_files
from shortstack.disk import disk_errors, require_space
from shortstack.errors import MissingExtraError, ShortstackError, require, unknown
from shortstack.export.onnx_build import build
from shortstack.families import check_rope, window_note
from shortstack.progress import OnProgress, silent

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"


@dataclass(frozen=True)
class Precision:
    """Bits of most weights, and the options in force where the spec names none."""

    bits: int
    defaults: tuple[tuple[str, str], ...] = ()


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(32),
    "int8": Precision(8, (("block", "32"),)),
    "int4": Precision(4, (("block", "32"), ("head", "int8"), ("wide", "down"))),
}

OPTIONS: dict[str, tuple[str, ...]] = {
    "block": ("16", "32", "64", "128"),
    "head": ("int4", "int8"),
    "wide": ("none", "down", "down+qkv"),
}
"""`block`: weights that share a scale; `head`: type of the output matrix, and of the embedding if
they are tied; `wide`: projections of an int4 model that get 8 bits.

Measured on SmolLM2-135M, KL to float32: all int4 0.38; head int8 0.30; and down 0.18; and qkv 0.09.
The builder's other algorithms (rtn, k_quant, asymmetric) were no better at equal size.
"""

PROJECTIONS = {"down": "mlp/down_proj", "qkv": "attn/qkv_proj"}


def settings(spec: ExportSpec) -> dict[str, str]:
    """The options in force: the precision's defaults, overridden by the spec's."""
    return {**dict(PRECISIONS[spec.precision].defaults), **dict(spec.options)}


def check(checkpoint: Checkpoint, spec: ExportSpec) -> None:
    packages = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
    require(packages, "onnx", "the export to ONNX")
    if spec.precision not in PRECISIONS:
        raise unknown("ONNX precision", spec.precision, PRECISIONS)
    check_rope(checkpoint.text)
    allowed = dict(PRECISIONS[spec.precision].defaults)
    for option, value in spec.options:
        if option not in OPTIONS:
            raise unknown("option of the onnx export", option, OPTIONS)
        if value not in OPTIONS[option]:
            raise unknown(f"value of {option}", value, OPTIONS[option])
        if option not in allowed:
            raise ShortstackError(
                f"{spec.precision} has no option {option!r}; "
                f"it has: {', '.join(allowed) or 'none'}. Leave it out."
            )
    block = int(settings(spec).get("block", "1"))
    for width in (checkpoint.dims["d"], checkpoint.dims["q"], checkpoint.dims["ff"]):
        if width % block:
            raise ShortstackError(
                f"block: rows of {width} cannot be cut into blocks of {block}. "
                "Choose a smaller block."
            )


def predict(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, int]:
    """Sizes from bits and block scales; RAM as measured: the float32 model about three times."""
    check(checkpoint, spec)
    float_bytes = 4 * checkpoint.n_params
    size = float_bytes if spec.precision == "fp32" else _quantized_bytes(checkpoint, spec)
    size += 200 * checkpoint.n_layers * 50 + 8 * _rotation_entries(checkpoint)
    return {
        "size_bytes": size,
        "peak_ram_bytes": 500_000_000 + 3 * float_bytes,
        "disk_bytes": size + (size if spec.precision == "fp32" else float_bytes // 2),
    }


def _rotation_entries(checkpoint: Checkpoint) -> int:
    """Entries of the table of cosines, as of that of sines, that the builder writes."""
    context = int(checkpoint.text.get("max_position_embeddings", 2048))
    return context * checkpoint.dims["head_dim"] // 2


def _quantized_bytes(checkpoint: Checkpoint, spec: ExportSpec) -> int:
    chosen, sizes = settings(spec), checkpoint.dims
    scale = 32 / int(chosen["block"])  # a float32 a block
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
    """The model's context, or its sliding window: the graphs attend to everything."""
    return families.context_tokens(checkpoint.config)


def calibrates(checkpoint: Checkpoint, spec: ExportSpec) -> bool:
    return False


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
    graph = _graph_module()
    require_space(out, predict(checkpoint, spec)["disk_bytes"])
    made, cache = out / ".build", out / ".cache"
    try:
        told = _told(checkpoint, spec)
        build(
            checkpoint.path,
            made,
            cache,
            spec.precision,
            n_layers=checkpoint.n_layers,
            progress=progress,
            **told,
        )
        with disk_errors(out / DATA):
            _move_model(checkpoint, spec, made, out, graph)
            _move_config(checkpoint, spec, made / CONFIG, out / CONFIG)
            for file in checkpoint.tokenizer_files:
                shutil.copyfile(file, out / file.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
    return Artifact(
        path=out,
        spec=spec,
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=sum((out / name).stat().st_size for name in (MODEL, DATA)),
        weight_bytes_per_token=graph.bytes_per_token(out / MODEL),
        sha256=hash_files(out, [MODEL, DATA, CONFIG]),
        source_sha256=checkpoint.sha256,
        notes=(*window_note(checkpoint.config), *_notes(spec)),
    )


def _int8_embedding(spec: ExportSpec) -> bool:
    """Whether the embedding is to be rewritten to 8 bits, after the head."""
    return spec.precision != "fp32" and settings(spec).get("head", "int8") == "int8"


def _move_model(
    checkpoint: Checkpoint, spec: ExportSpec, made: Path, out: Path, graph: ModuleType
) -> None:
    if _int8_embedding(spec):
        block = int(settings(spec)["block"])
        graph.write_with_int8_embedding(
            made / MODEL, out / MODEL, tied=checkpoint.tied, block=block
        )
        return
    for name in (MODEL, DATA):
        shutil.move(made / name, out / name)


def _move_config(checkpoint: Checkpoint, spec: ExportSpec, made: Path, out: Path) -> None:
    """Cut the context at a sliding window: the built graph attends to everything."""
    content = json.loads(made.read_text(encoding="utf-8"))
    context = context_tokens(checkpoint, spec)
    if context is not None and context < content["model"]["context_length"]:
        content["model"]["context_length"] = content["search"]["max_length"] = context
    out.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _told(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, Any]:
    """What the builder is told beyond the precision."""
    if spec.precision == "fp32":
        return {"options": [], "weights": None}
    chosen = settings(spec)
    wide = chosen.get("wide", "none")
    names = [
        f"/model/layers.{index}/{PROJECTIONS[part]}/MatMul"
        for index in range(checkpoint.n_layers)
        for part in wide.split("+")
        if part != "none"
    ]
    if chosen.get("head") == "int8":
        names.append("/lm_head/MatMul")
    shared = checkpoint.tied and not _int8_embedding(spec)
    return {
        "options": [f"shared_embeddings={str(shared).lower()}"],
        "weights": {
            "type": spec.precision,
            "method": "default",
            "block_size": int(chosen["block"]),
            "accuracy_level": 4,  # products in int8; in float they take ten times as long
            "op_types": ["MatMul"] if _int8_embedding(spec) else ["MatMul", "Gather"],
            "overrides": [{"match": {"name": name}, "type": "int8"} for name in names],
        },
    }


def _notes(spec: ExportSpec) -> tuple[str, ...]:
    chosen = settings(spec)
    return (", ".join(f"{name} {value}" for name, value in chosen.items()),) if chosen else ()


def _graph_module() -> ModuleType:
    try:
        from shortstack.export import onnx_graph
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx", "the export to ONNX") from None
    return onnx_graph
