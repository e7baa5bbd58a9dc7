"""The steps of a run. Each makes one folder from values and files, and is skipped when done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack import prune
from shortstack.artifact import Artifact
from shortstack.certify import ReferenceFacts, certify, make_reference
from shortstack.checkpoint import Checkpoint
from shortstack.devices.harness import measure
from shortstack.devices.host import describe, usable_cores
from shortstack.devices.measurement import Measurement
from shortstack.devices.protocol import Protocol
from shortstack.devices.schedule import Case
from shortstack.devices.workload import Prompt, Workload, warmup_tokens
from shortstack.errors import ShortstackError, VerificationError
from shortstack.export import exporter
from shortstack.footprint import against, in_words, measured
from shortstack.intake import open_model
from shortstack.manifest import read_manifest
from shortstack.progress import OnProgress
from shortstack.prune.plan import PrunePlan, Removal, parse_removal
from shortstack.recipe import (
    QUANTIZED,
    BenchRecipe,
    CalibrationRecipe,
    ExportRecipe,
    PruneRecipe,
    Recipe,
    TextRecipe,
    VerifyRecipe,
)
from shortstack.run_folder import RunFolder
from shortstack.runtimes import runtimes_for
from shortstack.text import Corpus, open_corpus
from shortstack.tokens import Encoder
from shortstack.verification import Bounds
from shortstack.windows import calibration_windows, fit_checks, unseen_windows

REFERENCES = "reference"
"""Where the float32 log-probabilities lie while artifacts are verified; removed after."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What came of one export: the artifact and its verification, or why there is none."""

    label: str
    spec: str
    artifact: Artifact | None
    verification: Mapping[str, Any] | None
    bounds: Mapping[str, Any]
    failure: str | None = None
    reference: Mapping[str, Any] | None = None
    """`perplexity` and `n_tokens` of the checkpoint in PyTorch, where no verification has them."""
    quantized: bool = False
    """Whether it was made of, and held against, the quantized checkpoint."""

    @property
    def measured_as(self) -> str:
        """The label in the campaign, which may have the same precision of the plain model, too."""
        return self.label + (QUANTIZED if self.quantized else "")


def open_text(text: str | TextRecipe) -> Corpus:
    return open_corpus(text.model_dump() if isinstance(text, TextRecipe) else text)


def wanted_layers(choice: PruneRecipe) -> int | Removal:
    """A count for methods that choose, layers and sub-blocks for `explicit`."""
    drop = choice.drop
    if choice.method == "explicit":
        return parse_removal(",".join(map(str, drop)) if isinstance(drop, list) else str(drop))
    if isinstance(drop, list) or not str(drop).isdecimal():
        raise ShortstackError(
            f"method {choice.method!r} chooses layers itself: drop must be a count, got {drop!r}. "
            "Name a count, or use the method explicit."
        )
    return int(drop)


def open_original(folder: RunFolder, model: str) -> Checkpoint:
    with folder.display.step("Open the model") as progress:
        return open_model(model, folder.path / "model", progress=progress)


def check_text(recipe: Recipe, original: Checkpoint, corpus: Corpus) -> None:
    """Cut every window that a later step will want: too little text is no news for the end."""
    encoder = Encoder(original)
    if recipe.prune is not None and prune.METHODS[recipe.prune.method].needs_text:
        encoder.windows(corpus.calibration, recipe.prune.window_tokens, recipe.prune.windows)
    for wanted in recipe.export:
        unseen_windows(original, corpus, checks_for(original, wanted, recipe.verify))
        if exporter(wanted.spec.format).calibrates(original, wanted.spec):
            calibration_windows(original, corpus, recipe.calibration)
    if recipe.export:
        encoder.windows(corpus.test, recipe.bench.prompt_tokens, 1)


def plan(folder: RunFolder, choice: PruneRecipe, original: Checkpoint, corpus: Corpus) -> PrunePlan:
    """Choose the layers on calibration text."""
    inputs = {"model": original.sha256, "text": corpus.sha256, "prune": choice.model_dump()}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        made = choose_layers(original, choice, corpus, progress)
        (partial / "plan.json").write_text(made.to_json(), encoding="utf-8")
        return {"drop": list(made.drop), "method": made.method}

    where, _ = folder.build("plan", "Choose layers", inputs, make)
    return PrunePlan.from_json((where / "plan.json").read_text(encoding="utf-8"))


def choose_layers(
    checkpoint: Checkpoint, choice: PruneRecipe, corpus: Corpus, progress: OnProgress
) -> PrunePlan:
    """Run the planner of a method on windows of calibration text."""
    windows: list[list[int]] = []
    if prune.METHODS[choice.method].needs_text:
        length, count = choice.window_tokens, choice.windows
        windows = Encoder(checkpoint).windows(corpus.calibration, length, count)
    return prune.planner(choice.method)(
        checkpoint,
        drop=wanted_layers(choice),
        windows=windows,
        progress=progress,
        **choice.options,
    )


def cut(folder: RunFolder, original: Checkpoint, made: PrunePlan) -> Checkpoint:
    """Write the pruned checkpoint."""
    inputs = {"model": original.sha256, "cut": prune.cut_identity(made)}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        return cut_facts(
            original, made, prune.apply_plan(original, made, partial, progress=progress)
        )

    where, _ = folder.build("pruned/checkpoint", "Cut the layers", inputs, make)
    return Checkpoint.open(where)


def cut_facts(original: Checkpoint, made: PrunePlan, pruned: Checkpoint) -> dict[str, Any]:
    return {
        "source_sha256": original.sha256,
        "sha256": pruned.sha256,
        "drop": list(made.drop),
        "removed": {"attention": list(made.attention), "mlp": list(made.mlp)},
        **({"merge": made.identity["merge"]} if made.merge else {}),
        **({"replace": dict(made.replace)} if made.replace else {}),
        "method": made.method,
        "n_layers": pruned.n_layers,
        "n_params": pruned.n_params,
        "n_bytes": pruned.n_bytes,
    }


def reference(
    folder: RunFolder, label: str, checkpoint: Checkpoint, windows: Sequence[Sequence[int]]
) -> ReferenceFacts:
    """Run a checkpoint in PyTorch on the test windows; what its artifacts are held against."""
    inputs = {"model": checkpoint.sha256, "windows": [list(w) for w in windows]}

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        made = make_reference(
            checkpoint,
            windows,
            partial / "log_probs.npy",
            threads=usable_cores(),
            progress=progress,
        )
        facts = dataclasses.asdict(made)
        return {"reference": {k: v for k, v in facts.items() if k not in ("path", "checkpoint")}}

    title = f"Run the {label} model in PyTorch"
    name = f"{REFERENCES}/{label}-{len(windows[0])}-tokens"
    where, manifest = folder.build(name, title, inputs, make)
    return ReferenceFacts(
        path=where / "log_probs.npy", checkpoint=checkpoint.path, **manifest["reference"]
    )


def export(
    folder: RunFolder,
    recipe: Recipe,
    label: str,
    checkpoint: Checkpoint,
    wanted: ExportRecipe,
    corpus: Corpus,
) -> Exported:
    """Export and verify one artifact. One that fails its check is removed and reported."""
    bounds = Bounds.of(wanted.spec, max_perplexity_ratio=wanted.max_perplexity_ratio)
    slug = recipe.slug(wanted)
    name = f"{label}/{slug}"
    codes = recipe.takes_codes(wanted)
    inputs = {
        **export_inputs(checkpoint, wanted, corpus),
        "verify": recipe.verify.model_dump(),
        "calibration": recipe.calibration.model_dump(),
    }
    checks = checks_for(checkpoint, wanted, recipe.verify)

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        assert truth is not None
        return export_and_certify(
            checkpoint,
            wanted,
            checks,
            recipe.calibration,
            corpus,
            truth,
            recipe.bench.threads or usable_cores(),
            partial,
            progress,
        )

    truth = None
    if not folder.holds(name, inputs):
        windows = unseen_windows(checkpoint, corpus, checks)
        truth = reference(folder, label + (QUANTIZED if codes else ""), checkpoint, windows)

    title = f"Export and verify {label} {slug}"
    try:
        where, manifest = folder.build(name, title, inputs, make)
    except VerificationError as error:
        # What an earlier run verified under a looser gate does not pass this one.
        shutil.rmtree(folder.path / name, ignore_errors=True)
        folder.display.note(f"FAILED: {error}")
        assert truth is not None
        return Exported(
            label,
            slug,
            None,
            None,
            dataclasses.asdict(bounds),
            str(error),
            {"perplexity": truth.perplexity, "n_tokens": truth.n_windows * truth.length},
            quantized=codes,
        )
    if truth is not None:
        folder.display.note(f"{name}: {in_words(manifest['footprint'])}")
    return Exported(
        label,
        slug,
        Artifact.from_dict(manifest["artifact"], where),
        manifest["verification"],
        manifest["bounds"],
        quantized=codes,
    )


def export_inputs(checkpoint: Checkpoint, wanted: ExportRecipe, corpus: Corpus) -> dict[str, Any]:
    """What decides an export, beside how it is calibrated and checked."""
    return {
        "model": checkpoint.sha256,
        "text": corpus.sha256,
        # which model it is of, "model" says; and keys of earlier versions still hold
        "export": wanted.model_dump(exclude={"quantized"}),
        "revision": exporter(wanted.spec.format).REVISION,
    }


def export_and_certify(
    checkpoint: Checkpoint,
    wanted: ExportRecipe,
    checks: VerifyRecipe,
    calibration: CalibrationRecipe,
    corpus: Corpus,
    truth: ReferenceFacts,
    threads: int,
    partial: Path,
    progress: OnProgress,
) -> dict[str, Any]:
    """Write an artifact into `partial` and prove it; returns its manifest's facts."""
    bounds = Bounds.of(wanted.spec, max_perplexity_ratio=wanted.max_perplexity_ratio)
    make = exporter(wanted.spec.format)
    windows: list[list[int]] = []
    if make.calibrates(checkpoint, wanted.spec):
        windows = calibration_windows(checkpoint, corpus, calibration)
    with measured() as meter:
        artifact = make.export(
            checkpoint, wanted.spec, partial, calibration=windows, progress=progress
        )
    proof = certify(
        artifact,
        unseen_windows(checkpoint, corpus, checks),
        truth,
        bounds,
        threads=threads,
        prefill_tokens=checks.window_tokens - checks.decode_tokens,
        text=corpus.test[0],
        progress=progress,
    )
    return {
        "artifact": artifact.to_dict(partial),
        "verification": proof.to_dict(),
        "bounds": dataclasses.asdict(bounds),
        "footprint": against(
            meter.footprint, make.predict(checkpoint, wanted.spec)["peak_ram_bytes"]
        ),
    }


def checks_for(checkpoint: Checkpoint, wanted: ExportRecipe, checks: VerifyRecipe) -> VerifyRecipe:
    """The recipe's checks, long enough to see a sliding window that the artifact has."""
    context = exporter(wanted.spec.format).context_tokens(checkpoint, wanted.spec)
    return fit_checks(checks, checkpoint, context)


def bench(
    folder: RunFolder,
    recipe: Recipe,
    exported: Sequence[Exported],
    original: Checkpoint,
    corpus: Corpus,
) -> list[Measurement]:
    """Measure every artifact in every runtime that opens it, all in one interleaved campaign."""
    prompt = first_prompt(original, corpus, recipe.bench.prompt_tokens)
    workload = to_workload(recipe.bench)
    found = [(e.measured_as, e.artifact) for e in exported if e.artifact is not None]
    inputs = {
        "artifacts": [[label, artifact.sha256] for label, artifact in found],
        "workload": workload.to_dict(),
        "prompt": prompt.sha256,
        "cpu": describe()["cpu"],
        "seed": recipe.seed,
    }

    def make(partial: Path, progress: OnProgress) -> dict[str, Any]:
        cases = [
            Case(label, artifact, runtime)
            for label, artifact in found
            for runtime in runtimes_for(artifact.format)[:1]
        ]
        protocol = Protocol(seed=recipe.seed)
        if not cases:  # nothing that a runtime opens
            return {"failures": []}
        measured = measure(cases, workload, prompt, progress=progress, protocol=protocol)
        write_measurements(partial, measured)
        return {"failures": [m.failure.message for m in measured if m.failure]}

    earlier = read_manifest(folder.path / "bench")
    if earlier is not None and earlier.get("failures"):
        shutil.rmtree(folder.path / "bench")  # a crash is worth another try
    where, _ = folder.build("bench", "Measure, in turn", inputs, make)
    paths = {artifact.sha256: artifact.path.parent for _, artifact in found}
    return read_measurements(where, paths)


def first_prompt(checkpoint: Checkpoint, corpus: Corpus, n_tokens: int) -> Prompt:
    window = Encoder(checkpoint).windows(corpus.test, n_tokens, 1)[0]
    return Prompt(tuple(window), f"{corpus.source}, test part")


def to_workload(choice: BenchRecipe) -> Workload:
    return Workload(
        prompt_tokens=choice.prompt_tokens,
        decode_tokens=choice.decode_tokens,
        warmup_prompt_tokens=warmup_tokens(choice.prompt_tokens, "cpu"),
        repeats=choice.repeats,
        threads=choice.threads or usable_cores(),
    )


def write_measurements(folder: Path, measured: Sequence[Measurement]) -> None:
    """One record a file: `original-gguf-q8_0-llama.cpp.json`."""
    for record in measured:
        name = f"{record.label}-{record.artifact.spec.slug}-{record.runtime}.json"
        text = json.dumps(record.to_dict(), indent=1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def read_measurements(folder: Path, paths: Mapping[str, Path]) -> list[Measurement]:
    """All records of a folder; `paths` maps an artifact's hash to the folder it lies in."""
    records = []
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if "trials" in data:
            where = paths.get(data["artifact"]["sha256"], folder)
            records.append(Measurement.from_dict(data, where))
    return records
