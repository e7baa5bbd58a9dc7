"""`shortstack export --to packed`; `shortstack unpack`: a packed model into a folder, or on into a
file that a runtime opens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.commands import stages
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.folder_lock import alone_in
from shortstack.footprint import against, in_words, measured
from shortstack.intake import is_packed, model_paths
from shortstack.manifest import (
    check_apart,
    check_ours,
    finished,
    read_manifest,
    staged,
    step_key,
    write_manifest,
)
from shortstack.packed.catalogue import BLOBS, NAME, is_catalogue, open_catalogue, variants
from shortstack.packed.catalogue import variant as find_variant
from shortstack.packed.catalogue_add import add, check_free, check_name, damaged_variants
from shortstack.packed.choose import Tries, options
from shortstack.packed.read import open_packed, verify
from shortstack.packed.unpack import check_complete, unpack_folder
from shortstack.packed.worth import read_worth
from shortstack.progress import Display
from shortstack.recipe import ExportRecipe

TARGETS = ("hf", "gguf:Q8_0", "onnx:int8")


def export_packed(model: str, wanted: ExportRecipe, out: Path, display: Display) -> dict[str, Any]:
    """Pack a model. Equal bytes prove all that a runtime could say of it: none is asked, so that
    memory is a few chunks whatever the model's size."""
    make, spec = exporter(wanted.spec.format), wanted.spec
    with stages.opened(model, out, display) as checkpoint:
        make.check(checkpoint, spec)
        inputs = {"model": checkpoint.sha256, "export": spec.slug, "revision": make.REVISION}
        key = step_key("export", {**inputs, "options": list(spec.options)})
        kept = finished(out, key)
        if kept is None:
            with staged(out, "export") as partial:
                with display.step(f"Pack and compare {spec.slug}") as progress, measured() as meter:
                    artifact = make.export(checkpoint, spec, partial, progress=progress)
                facts = {
                    "artifact": artifact.to_dict(partial),
                    "proof": {
                        "equal_bytes": checkpoint.n_bytes,
                        "tensors": len(checkpoint.tensors),
                    },
                    "footprint": against(
                        meter.footprint, make.predict(checkpoint, spec)["peak_ram_bytes"]
                    ),
                }
                kept = write_manifest(partial, "export", key, facts)
                display.note(in_words(facts["footprint"]))
    return {"folder": str(out), **stages.facts_of(kept), "worth": read_worth(out)}


def unpack(
    model: Path,
    to: str,
    out: Path,
    *,
    variant: str | None,
    zst: bool,
    text: str,
    max_perplexity_ratio: float,
    threads: int,
    display: Display,
) -> dict[str, Any]:
    """Unpack into the folder `out`; other formats than `hf` are exports, proven as every one."""
    if to not in TARGETS:
        raise ShortstackError(
            f"unpack writes {', '.join(TARGETS)}, not {to!r}. For other formats: "
            f"shortstack export {model} --to {to}"
        )
    model = _packed_model(model, variant)
    if to != "hf":
        wanted = ExportRecipe(to=to, max_perplexity_ratio=max_perplexity_ratio)
        return stages.export(
            str(model), wanted, text, out, threads=threads, dry_run=False, display=display, zst=zst
        )
    if zst:
        raise ShortstackError("--zst is for GGUF files, not for hf. Leave it out.")
    packed = open_packed(model)
    check_ours(out, "unpack")
    check_apart(out, [model])
    key = step_key("unpack", {"packed": packed.sha256})
    kept = finished(out, key)
    if kept is None:
        with display.step("Unpack") as progress, staged(out, "unpack") as partial:
            checkpoint = unpack_folder(packed, partial, progress)
            facts = {
                "packed_sha256": packed.sha256,
                "sha256": checkpoint.sha256,
                "n_tensors": len(checkpoint.tensors),
                "plain_bytes": packed.contents.plain_bytes,
            }
            kept = write_manifest(partial, "unpack", key, facts)
    return {"checkpoint": str(out), **stages.facts_of(kept)}


def check(model: Path, *, variant: str | None, display: Display) -> dict[str, Any]:
    """Hold a packed model against every checksum in it; nothing is written. Raises ShortstackError
    that names the first tensor or file that is damaged."""
    packed = open_packed(_packed_model(model, variant))
    with display.step("Check") as progress:
        check_complete(packed)
        verify(packed, progress)
    contents = packed.contents
    return {
        "whole": True,
        "packed_sha256": packed.sha256,
        "n_tensors": len(contents.tensors),
        "n_files": len(contents.entries) - len(contents.tensors),
        "plain_bytes": contents.plain_bytes,
    }


def _packed_model(model: Path, variant: str | None) -> Path:
    if model.is_dir() and is_catalogue(model):
        return find_variant(model, variant)
    if variant is not None:
        raise ShortstackError(f"{model} is no catalogue, it has no variants. Leave --variant out.")
    made = (read_manifest(model) or {}).get("artifact")
    if isinstance(made, dict) and is_packed(model / str(made.get("path"))):
        return model / str(made["path"])
    return model


def catalogue(
    models: Sequence[str], out: Path, texts: Sequence[str], display: Display
) -> dict[str, Any]:
    """Add models, each `MODEL` or `NAME=MODEL`, to the catalogue `out`."""
    allowed = options(dict(map(stages.split_option, texts)))
    named = [_named(text) for text in models]
    check_apart(out, [path for _, model in named for path in model_paths(model)])
    for n, (name, _) in enumerate(named):
        check_name(out, name)
        if name in [earlier for earlier, _ in named[:n]]:
            raise ShortstackError(f"two of the models are called {name}. Name one otherwise.")
        if name.lower() in [earlier.lower() for earlier, _ in named[:n]]:
            raise ShortstackError(
                f"two of the models are called {name} in small and large letters, which not every "
                "disk tells apart. Name one otherwise."
            )
    fresh, there = not is_catalogue(out), out.exists()
    open_catalogue(out)
    with alone_in(out):
        try:
            costs = _add_all(named, out, allowed, display)
        finally:
            if fresh and not variants(out):
                shutil.rmtree(out)
                if there:
                    out.mkdir()
        blobs = [file.stat().st_size for file in (out / BLOBS).iterdir()]
        answer = {"catalogue": str(out), "total_bytes": sum(blobs), "variants": costs}
        damaged = damaged_variants(out)
    return {**answer, "damaged": damaged} if damaged else answer


def _add_all(
    named: Sequence[tuple[str, str]], out: Path, allowed: Tries, display: Display
) -> list[dict[str, Any]]:
    """A name that another model has is refused before the first model is packed."""
    for name, model in named:
        if name in variants(out):
            with stages.opened(model, out, display) as checkpoint:
                check_free(out, name, checkpoint)
    costs = []
    for name, model in named:
        with (
            stages.opened(model, out, display) as checkpoint,
            display.step(f"Pack {name}") as progress,
        ):
            costs.append(add(out, name, checkpoint, allowed, progress).to_dict())
    return costs


def _named(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if equals and NAME.fullmatch(name) and not Path(text).exists():
        return name, model
    return Path(text).name.removesuffix(".gguf"), text
