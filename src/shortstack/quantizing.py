"""The step of a run that quantizes: original and pruned become codes times steps, once for all
exports that keep the codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, require
from shortstack.families import context_tokens
from shortstack.footprint import PROCESS_BYTES
from shortstack.progress import OnProgress
from shortstack.prune.quantize import QuantizeSettings, quantize
from shortstack.recipe import QuantizeRecipe, Recipe
from shortstack.run_folder import RunFolder
from shortstack.text import Corpus
from shortstack.tokens import Encoder

COMPENSATED = "compensated"


def check(recipe: Recipe) -> None:
    """Refuse what the step could not do. Raises ShortstackError."""
    if recipe.quantize is not None:
        require(("torch", "transformers"), "prune", "quantizing a model")
        _settings(recipe.quantize, recipe.seed)


def check_text(recipe: Recipe, original: Checkpoint, corpus: Corpus) -> None:
    """Cut every window that the step will want: too little text is no news for the end."""
    if recipe.quantize is not None:
        _windows(recipe.quantize, original, corpus)


def quantized(
    folder: RunFolder, recipe: Recipe, label: str, checkpoint: Checkpoint, corpus: Corpus
) -> Checkpoint:
    """The checkpoint `label` as codes times steps, with its sidecar, in `LABEL/quantized`."""
    choice = recipe.quantize
    if choice is None:
        raise ShortstackError("the recipe has no quantize step. Add it.")
    settings = _settings(choice, recipe.seed)
    inputs: dict[str, Any] = {"model": checkpoint.sha256, "settings": dataclasses.asdict(settings)}
    if choice.method == COMPENSATED:
        windows = [choice.windows, choice.window_tokens]
        inputs |= {"text": corpus.sha256, "windows": windows}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        windows = _windows(choice, checkpoint, corpus)
        made, facts = quantize(
            checkpoint, partial, settings, calibration=windows, progress=progress
        )
        sources = {"source_sha256": checkpoint.sha256, "sha256": made.sha256}
        return {"quantize": {**sources, **facts}}

    where, _ = folder.build(f"{label}/quantized", f"Quantize the {label} model", inputs, make)
    return Checkpoint.open(where)


def preview(checkpoint: Checkpoint) -> Checkpoint:
    """The quantized checkpoint as headers, before it exists: only for predictions."""
    from shortstack.prune.quantize.matrices import matrix_names

    wide = set(matrix_names(checkpoint))
    tensors = {
        name: dataclasses.replace(info, dtype="F32") if name in wide else info
        for name, info in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def predict(choice: QuantizeRecipe, checkpoint: Checkpoint) -> dict[str, int]:
    """`size_bytes` of the folder with its sidecar, `peak_ram_bytes` to make it.

    `compensated` has the model in float32 and at most as much again: the gradients of its pass
    backwards, a layer's H, activations of 2048 tokens. `plain` has one matrix's codes and a block.
    """
    from shortstack.prune.quantize.matrices import BLOCK_WEIGHTS, matrix_names
    from shortstack.prune.quantize.write import layout_of

    names = matrix_names(checkpoint)
    shapes = [checkpoint.tensors[name].shape for name in names]
    sidecar = sum(rows * columns + 2 * rows for rows, columns in shapes)
    beside = sum(file.stat().st_size for file in checkpoint.tokenizer_files)
    if choice.method == COMPENSATED:
        ram = PROCESS_BYTES + 2 * 4 * checkpoint.n_params + 2**30
    else:
        ram = PROCESS_BYTES + max(rows * columns for rows, columns in shapes) + 32 * BLOCK_WEIGHTS
    size = layout_of(checkpoint, names).n_bytes + sidecar + beside
    return {"size_bytes": size, "peak_ram_bytes": ram}


def packed_bytes(choice: QuantizeRecipe, checkpoint: Checkpoint) -> int:
    """A packed file of `bits` a weight, with a coder's own loss of up to 1 %."""
    from shortstack.packed.file import expected_room

    beside = sum(file.stat().st_size for file in checkpoint.tokenizer_files)
    weights = round(1.01 * choice.bits * checkpoint.n_params / 8)
    return weights + beside + expected_room(checkpoint)


def _settings(choice: QuantizeRecipe, seed: int) -> QuantizeSettings:
    return QuantizeSettings(choice.bits, choice.method, choice.rate_weight, seed)


def _windows(
    choice: QuantizeRecipe, checkpoint: Checkpoint, corpus: Corpus
) -> list[list[int]] | None:
    if choice.method != COMPENSATED:
        return None
    longest = context_tokens(checkpoint.config, windowed=True) or choice.window_tokens
    length = min(choice.window_tokens, longest)
    return Encoder(checkpoint).windows(corpus.calibration, length, choice.windows)
