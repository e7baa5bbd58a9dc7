"""The single stages behind the command line: each takes values and paths, returns plain data."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shortstack import forecast, prune, steps
from shortstack.artifact import Artifact
from shortstack.certify import make_reference, require_pytorch
from shortstack.checkpoint import Checkpoint
from shortstack.devices.host import check_threads
from shortstack.devices.report import ReportData, write_report
from shortstack.disk import require_space
from shortstack.errors import ShortstackError, require
from shortstack.exits import read_exits
from shortstack.export import exporter
from shortstack.footprint import in_words
from shortstack.intake import model_paths, open_model, preview_model
from shortstack.manifest import (
    check_apart,
    check_ours,
    check_place,
    finished,
    read_manifest,
    staged,
    step_key,
    write_manifest,
    write_text,
)
from shortstack.progress import Display
from shortstack.prune.plan import PrunePlan, parse_removal, read_plan
from shortstack.recipe import (
    CalibrationRecipe,
    ExportRecipe,
    PruneRecipe,
    VerifyRecipe,
)
from shortstack.text import open_corpus
from shortstack.windows import unseen_windows


def split_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ShortstackError(f"option {text!r} is not NAME=VALUE, e.g. head=Q6_K.")
    return name, value


def typed_options(texts: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Options as a recipe would have them: `screen=3` is a number, `dtype=float32` a word."""
    return {name: _typed(value) for name, value in map(split_option, texts)}


def _typed(value: str) -> bool | int | float | str:
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


@contextlib.contextmanager
def opened(model: str, near: Path, display: Display) -> Iterator[Checkpoint]:
    """Open a model; one that has to be made into a folder first lies beside `near` meanwhile."""
    folder = near.absolute().parent / f".{near.name}.model.partial"
    shutil.rmtree(folder, ignore_errors=True)  # what a hard kill left
    try:
        with display.step("Open the model") as progress:
            checkpoint = open_model(model, folder / "model", progress=progress)
        yield checkpoint
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(
    model: str, choice: PruneRecipe, text: str, out: Path, *, dry_run: bool, display: Display
) -> dict[str, Any]:
    """Choose layers and write the plan to the file `out`."""
    check_place(out)
    if out.is_dir():
        raise ShortstackError(f"{out} is a folder; the plan is one file. Name one, e.g. plan.json.")
    if out.exists():
        try:
            read_plan(out)
        except ShortstackError:
            raise ShortstackError(
                f"{out} exists and is no plan: it is not overwritten. Name another file."
            ) from None
    prune.check_options(choice.method, choice.options)
    preview = preview_model(model)
    if preview is not None:
        forecast.preview_cut(preview.checkpoint, choice)
    if dry_run:
        preview = forecast.preview_or_refuse(model)
        return {
            "method": choice.method,
            "drop": choice.drop,
            "n_layers": preview.checkpoint.n_layers,
            "peak_ram_bytes": 4 * preview.checkpoint.n_params + 2**29,
            "disk_bytes": preview.materialised_bytes,
        }
    corpus = open_corpus(text)
    with opened(model, out, display) as checkpoint, display.step("Choose layers") as progress:
        made = steps.choose_layers(checkpoint, choice, corpus, progress)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_text(out, made.to_json())
    return {"plan": str(out), **json.loads(made.to_json())}


def prune_model(
    model: str,
    drop: str | None,
    plan_file: Path | None,
    out: Path,
    *,
    dry_run: bool,
    display: Display,
) -> dict[str, Any]:
    """Cut the layers of `drop` or of a plan file; `out` becomes a Hugging Face folder."""
    if (drop is None) == (plan_file is None):
        raise ShortstackError("say what to drop: --drop 11-15,20 or --plan plan.json, one of them.")
    check_ours(out, "prune")
    check_apart(out, model_paths(model))
    preview = forecast.preview_or_refuse(model) if dry_run else preview_model(model)
    if preview is not None:
        made = _fitting_plan(drop, plan_file, preview.checkpoint)
        expected = prune.predict_prune(preview.checkpoint, made)
        if dry_run:
            return {**made.identity, **expected}
        require_space(out, expected["disk_bytes"] + preview.materialised_bytes)
    with opened(model, out, display) as checkpoint:
        made = _fitting_plan(drop, plan_file, checkpoint)
        key = step_key("prune", {"model": checkpoint.sha256, "cut": prune.cut_identity(made)})
        kept = finished(out, key)
        if kept is None:
            with display.step("Cut the layers") as progress, staged(out, "prune") as partial:
                pruned = prune.apply_plan(checkpoint, made, partial, progress=progress)
                facts = steps.cut_facts(checkpoint, made, pruned)
                kept = write_manifest(partial, "prune", key, facts)
    return {"checkpoint": str(out), **facts_of(kept)}


def _fitting_plan(drop: str | None, plan_file: Path | None, checkpoint: Checkpoint) -> PrunePlan:
    if plan_file is None:
        gone = parse_removal(drop or "")
        return PrunePlan(
            checkpoint.n_layers, gone.layers, "explicit", attention=gone.attention, mlp=gone.mlp
        )
    made = read_plan(plan_file)
    if made.n_layers != checkpoint.n_layers:
        raise ShortstackError(
            f"the plan {plan_file} is for {made.n_layers} layers, the model has "
            f"{checkpoint.n_layers}. Plan again."
        )
    return made


def exit_of(model: str, exit: int | None) -> str:
    """The reference of an exit. Raises ShortstackError for a model without it."""
    if exit is None:
        return model
    read_exits(Path(model)).check_exit(exit)
    return f"{model}@{exit}"


def export(
    model: str,
    wanted: ExportRecipe,
    text: str,
    out: Path,
    *,
    threads: int,
    dry_run: bool,
    display: Display,
    zst: bool = False,
) -> dict[str, Any]:
    """Export one artifact into the folder `out`, proven or not at all.

    `zst`: of a GGUF file also NAME.gguf.zst, for a download.
    """
    check_ours(out, "export")
    if zst:
        _check_zst(wanted)
    check_apart(out, model_paths(model))
    check_threads(threads)
    spec = wanted.spec
    if spec.format != "packed":
        require_pytorch()
    preview = forecast.preview_or_refuse(model) if dry_run else preview_model(model)
    checks = VerifyRecipe()
    if preview is not None:
        checks = forecast.fitting_checks(preview.checkpoint, wanted)
        expected = exporter(spec.format).predict(preview.checkpoint, spec)
        if dry_run:
            return {"export": spec.slug, **expected}
        require_space(out, expected["disk_bytes"] + preview.materialised_bytes)
    if spec.format == "packed":
        from shortstack.commands.packed import export_packed

        return export_packed(model, wanted, out, display)
    corpus = open_corpus(text)
    with opened(model, out, display) as checkpoint:
        exporter(spec.format).check(checkpoint, spec)  # of a hub model nothing was known before
        inputs = steps.export_inputs(checkpoint, wanted, corpus)
        key = step_key("export", {**inputs, "zst": True} if zst else inputs)
        kept = finished(out, key)
        if kept is None:
            with staged(out, "export") as partial:
                log_probs = partial / "log_probs.npy"
                checks = steps.checks_for(checkpoint, wanted, checks)
                windows = unseen_windows(checkpoint, corpus, checks)
                with display.step("Run the model in PyTorch") as progress:
                    reference = make_reference(
                        checkpoint, windows, log_probs, threads=threads, progress=progress
                    )
                with display.step(f"Export and verify {spec.slug}") as progress:
                    facts = steps.export_and_certify(
                        checkpoint,
                        wanted,
                        checks,
                        CalibrationRecipe(),
                        corpus,
                        reference,
                        threads,
                        partial,
                        progress,
                    )
                log_probs.unlink()
                if zst:
                    facts["download"] = _compress(partial, facts, display)
                kept = write_manifest(partial, "export", key, facts)
                display.note(in_words(facts["footprint"]))
    return {"folder": str(out), **facts_of(kept)}


def _check_zst(wanted: ExportRecipe) -> None:
    if wanted.spec.format != "gguf":
        raise ShortstackError(f"--zst is for GGUF files, not for {wanted.to}. Leave it out.")
    require(("zstandard",), "pack", "Zstandard")


def _compress(folder: Path, facts: dict[str, Any], display: Display) -> dict[str, Any]:
    from shortstack.packed.download import compress_file

    made = compress_file(folder / facts["artifact"]["path"])
    plain, coded = made["plain_bytes"], made["zst_bytes"]
    display.note(
        f"{made['file']}: {coded / 1e6:,.1f} MB of {plain / 1e6:,.1f} MB, {plain / coded:.2f} x"
    )
    return made


def open_artifact(folder: Path) -> Artifact:
    """Read the manifest of a folder that `export` or `run` made."""
    manifest = read_manifest(folder)
    if manifest is None or "artifact" not in manifest:
        raise ShortstackError(
            f"{folder} is not an artifact folder: its shortstack.json has no artifact. "
            "Name a folder that shortstack export or run made."
        )
    if finished(folder, manifest["key"]) is None:
        raise ShortstackError(
            f"{folder} has changed since it was verified: a file is missing or differs from its "
            "shortstack.json. Export it again."
        )
    try:
        return Artifact.from_dict(manifest["artifact"], folder)
    except (KeyError, TypeError):
        raise ShortstackError(f"{folder}/shortstack.json is damaged. Export it again.") from None


def report(run_folder: Path, out: Path) -> dict[str, Any]:
    """Write the report of a run again, from its report.json."""
    source = run_folder / "report.json"
    try:
        data = ReportData.from_dict(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShortstackError(
            f"{run_folder} has no readable report.json ({type(error).__name__}). "
            "Run: shortstack run RECIPE -o OUT"
        ) from None
    if out != run_folder:
        with staged(out, "report") as partial:
            write_report(data, partial)
            write_manifest(partial, "report", step_key("report", {"of": data.to_dict()}), {})
    else:
        write_report(data, out)
    return {"report": str(out / "report.html")}


def facts_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a user wants of a manifest; the rest is for us."""
    ours = ("tool", "version", "schema", "step", "key", "files")
    return {name: value for name, value in manifest.items() if name not in ours}
