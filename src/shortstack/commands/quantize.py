"""`shortstack quantize MODEL`: weights as codes and steps that an entropy coder makes small."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.commands.quantize_learning import beside, learning_text
from shortstack.commands.stages import opened
from shortstack.errors import SettingError, ShortstackError
from shortstack.families import context_tokens
from shortstack.intake import model_paths
from shortstack.manifest import check_apart, check_ours, finished, staged, step_key, write_manifest
from shortstack.progress import Display
from shortstack.prune.quantize import LearningText, QuantizeSettings, quantize
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
    max_perplexity_ratio: float | None = None,
    self_generated_tokens: int = 0,
) -> dict[str, Any]:
    """Quantize `model`; `out` becomes a Hugging Face folder with the sidecar of codes.

    `text`: its calibration part, `windows` of `window_tokens` tokens, is what `compensated` is
    fitted to; `plain` does not open it. `max_perplexity_ratio`: instead of `settings.bits`, the
    fewest bits found whose perplexity on as many windows of the text's selection part is at most
    so many times the original's. `self_generated_tokens`: how much text the model writes itself,
    for codes to learn from beside the calibration part. Raises ShortstackError where none of the
    tries is that good.
    """
    check_ours(out, "quantize")
    check_apart(out, model_paths(model))
    if max_perplexity_ratio is not None and not 1.0 < max_perplexity_ratio < math.inf:
        raise SettingError("max_perplexity_ratio", f"must be above 1, got {max_perplexity_ratio}.")
    judged, learns = max_perplexity_ratio is not None, settings.learn_tokens > 0
    if self_generated_tokens and not learns:
        raise SettingError("self_generated_tokens", "is for learning codes. Add --learn-tokens.")
    wants_text = judged or learns or settings.method == "compensated"
    corpus = open_corpus(text) if wants_text else None
    with opened(model, out, display) as checkpoint:
        inputs: dict[str, Any] = {
            "model": checkpoint.sha256,
            "settings": dataclasses.asdict(settings),
        }
        calibration, selection = None, None
        if corpus is not None:
            inputs |= {"text": corpus.sha256, "windows": [windows, window_tokens]}
            longest = context_tokens(checkpoint.config, windowed=True) or window_tokens
            length = min(window_tokens, longest)
            calibration = Encoder(checkpoint).windows(corpus.calibration, length, windows)
            if judged:
                selection = Encoder(checkpoint).windows(corpus.selection, length, windows)
                inputs |= {"max_perplexity_ratio": max_perplexity_ratio}
            if learns:
                inputs |= {"self_generated_tokens": self_generated_tokens}
        key = step_key("quantize", inputs)
        kept = finished(out, key)
        if kept is None:
            learning = None
            if learns and corpus is not None:
                learning = learning_text(
                    *(checkpoint, corpus, settings, length, self_generated_tokens),
                    *(out, key, display),
                )
            with staged(out, "quantize") as partial:
                make = functools.partial(
                    _quantized, checkpoint, settings, calibration, learning, display
                )
                if max_perplexity_ratio is None:
                    facts = make(partial, settings.bits)
                else:
                    assert selection is not None
                    facts = _searched(
                        checkpoint, partial, make, selection, max_perplexity_ratio, display
                    )
                facts = {"source_sha256": checkpoint.sha256, **facts}
                kept = write_manifest(partial, "quantize", key, {"quantize": facts})
            beside(out, "samples").unlink(missing_ok=True)
    return {"checkpoint": str(out), **kept["quantize"]}


def _quantized(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    calibration: list[list[int]] | None,
    learning: LearningText | None,
    display: Display,
    out: Path,
    bits: float,
) -> dict[str, Any]:
    settings = dataclasses.replace(settings, bits=bits)
    if learning is not None:
        learning = dataclasses.replace(learning, key=f"{learning.key} {bits}")
    with display.step("Quantize") as progress:
        texts: dict[str, Any] = {"calibration": calibration, "learning": learning}
        return quantize(checkpoint, out, settings, **texts, progress=progress)[1]


def _searched(
    checkpoint: Checkpoint,
    out: Path,
    make: Callable[[Path, float], dict[str, Any]],
    selection: list[list[int]],
    ratio: float,
    display: Display,
) -> dict[str, Any]:
    """Try numbers of bits, each in a folder within `out`; the best one's files go to `out`."""
    from shortstack.prune.quantize.target import best_of, fewest_bits, mean_nats

    before = mean_nats(checkpoint, selection)
    made: dict[float, dict[str, Any]] = {}

    def ratio_at(bits: float) -> float:
        folder = out / f"{bits}"
        folder.mkdir()
        made[bits] = make(folder, bits)
        found = math.exp(mean_nats(Checkpoint.open(folder), selection) - before)
        display.note(f"{made[bits]['bits_per_weight']:.3f} bits: perplexity x {found:.4f}")
        return found

    tried = fewest_bits(ratio, ratio_at)
    best = best_of(tried, ratio)
    if best is None:
        lowest = min(tried, key=lambda one: one.ratio)
        raise ShortstackError(
            f"none of {len(tried)} tries keeps perplexity x {ratio:g}; the best is "
            f"{lowest.bits:g} bits with x {lowest.ratio:.4f}. Allow a higher ratio."
        )
    for file in (out / f"{best.bits}").iterdir():
        file.rename(out / file.name)
    for bits in made:
        shutil.rmtree(out / f"{bits}")
    return {**made[best.bits], "tried": [dataclasses.asdict(one) for one in tried]}


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
