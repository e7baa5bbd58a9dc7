"""From what the steps left to the report's data."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.devices.host import describe, libraries
from shortstack.devices.measurement import Measurement
from shortstack.devices.report import Entry, ModelFacts, Quality, ReportData, depth, speedups
from shortstack.prune.plan import PrunePlan
from shortstack.recipe import QUANTIZED, Recipe
from shortstack.runtimes import runtimes_for
from shortstack.steps import Exported
from shortstack.text import Corpus
from shortstack.verification import Verification


def collect(
    recipe: Recipe,
    corpus: Corpus,
    plan: PrunePlan | None,
    models: Mapping[str, Checkpoint],
    exported: Sequence[Exported],
    measured: Sequence[Measurement],
    command: str,
    *,
    exits: Mapping[str, Any] | None = None,
    early_exit: Sequence[Mapping[str, Any]] | None = None,
) -> ReportData:
    """Put together what one run made, proved and measured."""
    records = {(m.label, m.artifact.spec.slug): m for m in measured}
    pruned = models.get("pruned")
    name = recipe.model.rpartition("/")[2].removesuffix(".gguf")
    return ReportData(
        model=model_facts(name, recipe.model, models["original"]),
        pruned=None if pruned is None else model_facts(f"{name}, pruned", recipe.model, pruned),
        plan=None if plan is None else plan_facts(plan),
        exits=exits,
        early_exit=early_exit,
        quality=quality(exported, corpus),
        entries=tuple(_entry(e, _record(e, records)) for e in exported),
        host=describe(),
        versions=libraries(),
        recipe=recipe.model_dump(mode="json"),
        command=command,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def plan_facts(plan: PrunePlan) -> dict[str, Any]:
    return {
        "n_layers": plan.n_layers,
        "drop": list(plan.drop),
        "method": plan.method,
        "scores": [None if s != s else s for s in plan.scores],
        "facts": dict(plan.facts),
    }


def model_facts(name: str, source: str, checkpoint: Checkpoint) -> ModelFacts:
    return ModelFacts(
        name=name,
        source=source,
        sha256=checkpoint.sha256,
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        n_bytes=checkpoint.n_bytes,
    )


def quality(exported: Sequence[Exported], corpus: Corpus) -> Quality | None:
    """Perplexity of both checkpoints in PyTorch: the references that artifacts were held to."""
    found: dict[str, tuple[float, int]] = {}
    for e in (e for e in exported if not e.quantized):
        if e.verification is not None:
            found[e.label] = e.verification["reference_perplexity"], e.verification["n_tokens"]
        elif e.reference is not None:
            found.setdefault(e.label, (e.reference["perplexity"], e.reference["n_tokens"]))
    if not {"original", "pruned"} <= found.keys():
        return None
    return Quality(
        original_perplexity=found["original"][0],
        pruned_perplexity=found["pruned"][0],
        n_tokens=found["pruned"][1],
        text_source=f"{corpus.source}, test part",
        text_sha256=corpus.sha256,
    )


def summary(
    data: ReportData, paths: tuple[Path, Path, Path], failures: list[str]
) -> dict[str, Any]:
    """What `shortstack run --json` prints: the figures a script wants, and where the rest is."""
    worse = data.quality
    return {
        "report": str(paths[0]),
        "dropped_layers": list(data.plan["drop"]) if data.plan else [],
        "perplexity": None
        if worse is None
        else {"original": worse.original_perplexity, "pruned": worse.pruned_perplexity},
        "comparisons": [
            {
                "label": c.label,
                "spec": c.spec,
                "runtime": c.runtime,
                "decode_speedup": None if c.decode_speedup is None else vars(c.decode_speedup),
                "bytes_per_token_ratio": c.bytes_ratio,
                "size_ratio": c.size_ratio,
                "peak_memory_ratio": c.peak_ratio,
            }
            for c in speedups(data.entries)
        ],
        "exits": data.exits,
        "early_exit": data.early_exit,
        "tables": [[t.caption, t.columns, t.rows] for t in depth.tables(data)],
        "failures": failures,
    }


def _record(
    exported: Exported, records: Mapping[tuple[str, str], Measurement]
) -> Measurement | None:
    """Its measurement, under the label that the report compares by."""
    slug = exported.spec.removesuffix(QUANTIZED) if exported.quantized else exported.spec
    found = records.get((exported.measured_as, slug))
    return None if found is None else dataclasses.replace(found, label=exported.label)


def _entry(exported: Exported, measured: Measurement | None) -> Entry:
    fmt = exported.spec.partition("-")[0]
    proof = exported.verification
    return Entry(
        label=exported.label,
        spec=exported.spec,
        runtime=measured.runtime if measured else _proof_runtime(fmt, proof),
        artifact=exported.artifact.to_dict() if exported.artifact else None,
        verification=None if proof is None else _verification(Verification.from_dict(dict(proof))),
        bounds=None
        if not exported.bounds
        else {
            "mean_kl_prefill": exported.bounds["max_kl"],
            "mean_kl_decode": exported.bounds["max_kl"],
            "top1_agreement": exported.bounds["min_top1"],
            "perplexity_ratio": exported.bounds["max_perplexity_ratio"],
        },
        measurement=measured,
        failure=exported.failure,
    )


def _proof_runtime(fmt: str, proof: Mapping[str, Any] | None) -> str:
    return str(proof["runtime"]) if proof else (*runtimes_for(fmt), "pytorch")[0]


def _verification(found: Verification) -> dict[str, Any]:
    return {
        "runtime": f"{found.runtime} {found.runtime_version}",
        "n_tokens": found.n_tokens,
        "mean_kl_prefill": found.kl_prefill,
        "mean_kl_decode": found.kl_decode,
        "top1_agreement": found.top1,
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
        "perplexity_ratio": found.perplexity_ratio,
        "tokenizer_equal": found.tokenizer_equal,
    }
