"""What a run will write, and whether it can: from headers alone, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack import early_exit_steps, exit_steps, mend, prune, quantizing
from shortstack.certify import require_pytorch
from shortstack.checkpoint import Checkpoint
from shortstack.devices.host import check_threads
from shortstack.disk import require_space
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.families import context_tokens
from shortstack.intake import Preview, model_paths, preview_model
from shortstack.manifest import check_apart, check_ours
from shortstack.prune.plan import PrunePlan
from shortstack.recipe import QUANTIZED, ExportRecipe, PruneRecipe, Recipe, VerifyRecipe
from shortstack.steps import checks_for, wanted_layers

RESERVE_BYTES = 64 * 2**20


def refuse(recipe: Recipe, out: Path) -> None:
    """Refuse what no step could do, before the first expensive second.

    Raises ShortstackError for an unknown method or precision, layers that do not exist, an output
    folder that is not ours, and a disk that cannot hold the result.
    """
    check_ours(out, "run")
    check_apart(out, model_paths(recipe.model))
    check_threads(recipe.bench.threads)
    require_pytorch()
    mend.check(recipe)
    quantizing.check(recipe)
    early_exit_steps.check(recipe)
    preview = preview_model(recipe.model)
    exit_steps.check(recipe, preview)
    if preview is None:  # a hub model: its size is checked when it is downloaded
        if recipe.prune is not None:
            prune.planner(recipe.prune.method)
        return
    check_context(recipe, preview.checkpoint)
    rows = predict_steps(recipe, preview)
    if not out.exists():
        require_space(out, max(row["disk_bytes"] for row in rows), RESERVE_BYTES)
        # Everything but the peaks stays: the sum is what a whole run needs.
        require_space(out, sum(row["size_bytes"] for row in rows), RESERVE_BYTES)


def check_opened(recipe: Recipe, original: Checkpoint) -> None:
    """Refuse what headers alone could not tell: a hub model's context, a tokenizer's rules."""
    check_context(recipe, original)
    exit_steps.check_opened(recipe, original)
    for wanted in recipe.export:
        exporter(wanted.spec.format).check(original, wanted.spec)


def check_context(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Refuse to run a model, or an artifact of it, beyond the positions that it is right for."""
    context = context_tokens(checkpoint.config, windowed=True)
    for name in ("prune", "exits"):
        if (part := getattr(recipe, name)) is not None:
            _check_length(f"{name}.window_tokens", part.window_tokens, "the model's", context)
    bench = recipe.bench.prompt_tokens + recipe.bench.decode_tokens
    for wanted in recipe.export:
        context = exporter(wanted.spec.format).context_tokens(checkpoint, wanted.spec)
        whose = f"{wanted.spec.slug}'s"
        _check_length("verify.window_tokens", recipe.verify.window_tokens, whose, context)
        _check_length("bench.prompt_tokens + decode_tokens", bench, whose, context)


def _check_length(name: str, n_tokens: int, whose: str, context: int | None) -> None:
    if context is not None and n_tokens > context:
        raise ShortstackError(
            f"{name} is {n_tokens}, {whose} context is {context} tokens. Ask for less."
        )


def fitting_checks(checkpoint: Checkpoint, wanted: ExportRecipe) -> VerifyRecipe:
    """The default check, shortened for an artifact with a short context."""
    usual = VerifyRecipe()
    context = exporter(wanted.spec.format).context_tokens(checkpoint, wanted.spec)
    context = context or usual.window_tokens
    length = max(16, min(usual.window_tokens, context))
    return VerifyRecipe(
        windows=usual.windows, window_tokens=length, decode_tokens=min(64, length // 2)
    )


def forecast(recipe: Recipe) -> dict[str, Any]:
    """Predict each step's result: size, peak memory, disk at its worst moment. Writes nothing."""
    early_exit_steps.check(recipe)
    preview = preview_or_refuse(recipe.model)
    exit_steps.check(recipe, preview)
    rows = predict_steps(recipe, preview)
    models = preview_models(recipe, preview.checkpoint)
    return {
        "model": recipe.model,
        "method": recipe.prune.method if recipe.prune else None,
        "drop": recipe.prune.drop if recipe.prune else None,
        "n_layers": {label: model.n_layers for label, model in models.items()},
        "n_params": {label: model.n_params for label, model in models.items()},
        "steps": rows,
        "size_bytes": sum(row["size_bytes"] for row in rows),
        "peak_ram_bytes": max(row["peak_ram_bytes"] for row in rows),
    }


def preview_or_refuse(model: str) -> Preview:
    preview = preview_model(model)
    if preview is None:
        raise ShortstackError(
            f"{model} would have to be downloaded to say more. Download it first, then name the "
            "folder."
        )
    return preview


def predict_steps(recipe: Recipe, preview: Preview) -> list[dict[str, Any]]:
    """One row a step: what it writes, and the memory and disk it needs meanwhile."""
    original = preview.checkpoint
    models = preview_models(recipe, original)
    rows = []
    if preview.materialised_bytes:
        rows.append(_row("model", preview.materialised_bytes, 2**28))
    if recipe.early_exit is not None:
        rows.append(_row("early-exit", 2**20, 5 * original.n_params + 2**29))
    if recipe.prune is not None:
        cut = prune.predict_prune(original, _stand_in(original, recipe.prune))
        rows.append(_row("pruned/checkpoint", *_needs(cut)))
        rows += _mending(recipe, original, models["pruned"], cut["output_bytes"])
    if recipe.exits is not None:
        predicted = exit_steps.predict(original, recipe.exits)
        rows += [_row(name, *_needs(made)) for name, made in predicted]
    for label, checkpoint in models.items():
        plain = [wanted for wanted in recipe.export if not recipe.takes_codes(wanted)]
        rows += _exports(recipe, label, checkpoint, plain)
        coded = [wanted for wanted in recipe.export if recipe.takes_codes(wanted)]
        if recipe.quantize is not None and coded:
            made = quantizing.predict(recipe.quantize, checkpoint)
            rows.append(_row(f"{label}/quantized", made["size_bytes"], made["peak_ram_bytes"]))
            rows += _exports(recipe, label, quantizing.preview(checkpoint), coded)
    return rows


def preview_models(recipe: Recipe, original: Checkpoint) -> dict[str, Checkpoint]:
    """Every model that is exported, by label, as headers."""
    models = {"original": original}
    if recipe.prune is not None:
        models["pruned"] = preview_cut(original, recipe.prune)
    if recipe.exits is not None:
        for exit in recipe.exits.chosen:
            label = exit_steps.label_of(exit)
            models[label] = exit_steps.preview(original, recipe.exits, exit)
    return models


def _needs(predicted: Mapping[str, int]) -> tuple[int, int, int]:
    return predicted["output_bytes"], predicted["peak_ram_bytes"], predicted["disk_bytes"]


def _exports(
    recipe: Recipe, label: str, checkpoint: Checkpoint, exports: Sequence[ExportRecipe]
) -> list[dict[str, Any]]:
    """The reference in PyTorch for each length of check, then the artifacts of one checkpoint."""
    rows = []
    checks = {checks_for(checkpoint, wanted, recipe.verify) for wanted in exports}
    suffix = QUANTIZED if any(map(recipe.takes_codes, exports)) else ""
    for verify in sorted(checks, key=lambda check: check.window_tokens):
        n_bytes = 4 * verify.windows * verify.window_tokens * checkpoint.dims["vocab"]
        ram = 5 * checkpoint.n_params + n_bytes // verify.windows * 3
        rows.append(_row(f"reference/{label}{suffix} (removed after)", n_bytes, ram))
    for wanted in exports:
        expected = exporter(wanted.spec.format).predict(checkpoint, wanted.spec)
        size = expected["size_bytes"]
        if recipe.quantize is not None and wanted.spec.format == "packed":
            size = min(size, quantizing.packed_bytes(recipe.quantize, checkpoint))
        peaks = expected["peak_ram_bytes"], expected["disk_bytes"]
        if wanted.spec.format == "packed":  # PyTorch opens what it unpacks to, beside it
            peaks = peaks[0], peaks[1] + checkpoint.n_bytes
        rows.append(_row(f"{label}/{recipe.slug(wanted)}", size, *peaks))
    return rows


def _mending(
    recipe: Recipe, original: Checkpoint, pruned: Checkpoint, n_bytes: int
) -> list[dict[str, Any]]:
    """Repair and healing: a folder like the cut one each. Healing holds the student in float32
    with gradients and two moments, the best state, and the teacher."""
    rows = []
    if recipe.repair is not None:
        rows.append(_row("pruned/repaired", n_bytes, 4 * (original.n_params + pruned.n_params)))
    if recipe.heal is not None:
        states = 5 * 4 * pruned.n_params
        rows.append(
            _row(
                "pruned/healed",
                n_bytes,
                states + 4 * original.n_params + 2**31,
                n_bytes + 4 * 4 * pruned.n_params,
            )
        )
    return rows


def _row(name: str, size: int, ram: int, disk: int | None = None) -> dict[str, Any]:
    return {
        "step": name,
        "size_bytes": size,
        "peak_ram_bytes": ram,
        "disk_bytes": size if disk is None else disk,
    }


def _stand_in(original: Checkpoint, choice: PruneRecipe) -> PrunePlan:
    """The plan, or one of the right size: the last layers, which no rhythm of layers minds."""
    prune.planner(choice.method)
    wanted = wanted_layers(choice)
    if isinstance(wanted, int):
        # A sub-block that goes alone leaves zeros in the folder: the size of no cut is a bound.
        whole = 0 if prune.METHODS[choice.method].sub_blocks else wanted
        if wanted >= original.n_layers * (1 if whole else 2):
            raise ShortstackError(
                f"cannot drop {wanted} of {original.n_layers} layers. Ask for fewer."
            )
        return PrunePlan(
            original.n_layers,
            tuple(range(original.n_layers - whole, original.n_layers)),
            choice.method,
        )
    return PrunePlan(
        original.n_layers, wanted.layers, choice.method, attention=wanted.attention, mlp=wanted.mlp
    )


def preview_cut(original: Checkpoint, choice: PruneRecipe) -> Checkpoint:
    """The pruned checkpoint as headers, before it exists: only for predictions."""
    return prune.preview(original, _stand_in(original, choice))
