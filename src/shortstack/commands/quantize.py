"""`shortstack quantize MODEL`: weights as codes and steps that an entropy coder makes small."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.commands.stages import opened
from shortstack.families import context_tokens
from shortstack.intake import model_paths
from shortstack.manifest import check_apart, check_ours, finished, staged, step_key, write_manifest
from shortstack.progress import Display
from shortstack.prune.quantize import QuantizeSettings, quantize
from shortstack.text import open_corpus
from shortstack.tokens import Encoder


def quantize_model(
    model: str,
    text: str,
    out: Path,
    settings: QuantizeSettings,
    *,
    windows: int,
    window_tokens: int,
    display: Display,
) -> dict[str, Any]:
    """Quantize `model`; `out` becomes a Hugging Face folder with the sidecar of codes.

    `text`: its calibration part, `windows` of `window_tokens` tokens, is what `compensated` is
    fitted to; `plain` does not open it.
    """
    check_ours(out, "quantize")
    check_apart(out, model_paths(model))
    corpus = open_corpus(text) if settings.method == "compensated" else None
    with opened(model, out, display) as checkpoint:
        inputs: dict[str, Any] = {
            "model": checkpoint.sha256,
            "settings": dataclasses.asdict(settings),
        }
        calibration = None
        if corpus is not None:
            inputs |= {"text": corpus.sha256, "windows": [windows, window_tokens]}
            longest = context_tokens(checkpoint.config, windowed=True) or window_tokens
            length = min(window_tokens, longest)
            calibration = Encoder(checkpoint).windows(corpus.calibration, length, windows)
        key = step_key("quantize", inputs)
        kept = finished(out, key)
        if kept is None:
            with display.step("Quantize") as progress, staged(out, "quantize") as partial:
                _, facts = quantize(
                    checkpoint, partial, settings, calibration=calibration, progress=progress
                )
                facts = {"source_sha256": checkpoint.sha256, **facts}
                kept = write_manifest(partial, "quantize", key, {"quantize": facts})
    return {"checkpoint": str(out), **kept["quantize"]}


def table(facts: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of kind, weights, bits a weight and zeros: matrices of all layers together."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in facts["matrices"]:
        parts = [part for part in one["name"].split(".") if not part.isdecimal()]
        kinds.setdefault(".".join(parts[-3:-1]), []).append(one)
    rows = []
    for kind, members in kinds.items():
        n = sum(m["n_weights"] for m in members)
        bits = sum(m["bits_per_weight"] * m["n_weights"] for m in members) / n
        zeros = sum(m["zeros"] * m["n_weights"] for m in members) / n
        rows.append((kind, f"{n:,}", f"{bits:.3f}", f"{zeros:.1%}"))
    quantized = sum(one["n_weights"] for one in facts["matrices"])
    left = facts["n_weights"] - quantized
    if left:
        bits = 8 * facts["other_bytes"] / left
        rows.append(("not quantized", f"{left:,}", f"{bits:.3f}", ""))
    total = f"{facts['bits_per_weight']:.3f}"
    return [*rows, ("whole file", f"{facts['n_weights']:,}", total, f"{facts['zeros']:.1%}")]
