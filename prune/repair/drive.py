"""Fit every repair that is asked for, gap by gap; keep the best, if it is better than none."""

from __future__ import annotations

import dataclasses
import importlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress
from shortstack.prune.apply import PLAN_FILE
from shortstack.prune.calibrate import LayerwiseModel, batches, choose_dtype
from shortstack.prune.plan import PrunePlan
from shortstack.prune.repair import CHOICES, REPAIRS, Repair
from shortstack.prune.repair.boundaries import Boundary, boundaries
from shortstack.prune.repair.fold import projection, write_repaired
from shortstack.prune.repair.maps import Map, OwnMlp, Slot
from shortstack.prune.repair.origin import check_made_of
from shortstack.prune.repair.patch import basis
from shortstack.prune.repair.statistics import Statistics
from shortstack.prune.repair.support import refusal, skipped
from shortstack.prune.repair.walk import Walk
from shortstack.prune.scoring import perplexity


@dataclass
class Chain:
    """One repair on its way up through the gaps."""

    name: str
    calibration: Walk
    selection: Walk
    nats: float
    maps: list[tuple[Boundary, Map]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made(self) -> Repair:
        return REPAIRS[self.name]


@dataclass(frozen=True)
class Attempt:
    """What a repair came to: its maps and summed selection nats, or why it was not tried."""

    name: str
    maps: tuple[tuple[Boundary, Map], ...] = ()
    log: tuple[dict[str, Any], ...] = ()
    nats: float = float("inf")
    refused: str | None = None


def run(
    original: Checkpoint,
    pruned: Checkpoint,
    plan: PrunePlan,
    calibration: list[list[int]],
    selection: list[list[int]],
    out: Path,
    method: str,
    dtype: str,
    progress: OnProgress,
) -> tuple[Checkpoint, dict[str, Any]]:
    """See `shortstack.prune.repair.repair`."""
    check_made_of(original, pruned, plan)
    refused = _refusals(pruned, method)
    parts, chosen_on = batches(calibration), batches(selection)
    n_tokens = sum(tokens.numel() for tokens in parts)
    if n_tokens < pruned.dims["d"]:
        raise ShortstackError(
            f"{n_tokens} tokens of calibration text cannot determine a map of {pruned.dims['d']} "
            "numbers. Give more text or more windows."
        )
    n_predicted = sum(tokens[:, 1:].numel() for tokens in chosen_on)
    attempts, before, whole = fit_all(
        original, pruned, plan, parts, chosen_on, refused, out, dtype, progress
    )
    facts: dict[str, Any] = {
        "method": method,
        "kept": None,
        "dtype": str(choose_dtype(dtype)).split(".")[1],
        "tokens": {"calibration": n_tokens, "selection": n_predicted},
        "selection_perplexity": {
            "original": perplexity(whole / n_predicted),
            "pruned": perplexity(before / n_predicted),
        },
        "candidates": {a.name: _facts(a, before, n_predicted) for a in attempts},
    }
    return _write_best(original, pruned, plan, attempts, before, chosen_on, out, dtype, facts)


def _refusals(pruned: Checkpoint, method: str) -> dict[str, str | None]:
    """Repair -> why the model cannot hold it. Raises ShortstackError if it can hold none."""
    refused = {name: refusal(pruned, REPAIRS[name].kind) for name in CHOICES[method]}
    if all(refused.values()):
        name = next(iter(refused))
        raise ShortstackError(
            f"{pruned.path} cannot hold the repair {name!r}: {refused[name]}. Try: --method auto"
        )
    return refused


def fit_all(
    original: Checkpoint,
    pruned: Checkpoint,
    plan: PrunePlan,
    parts: list[Tensor],
    chosen_on: list[Tensor],
    refused: dict[str, str | None],
    out: Path,
    dtype: str,
    progress: OnProgress,
) -> tuple[list[Attempt], float, float]:
    """Attempts in the order of `refused`; summed selection nats of the cut and the full model."""
    gaps = boundaries(plan)
    names = [name for name, reason in refused.items() if reason is None]
    per_token = pruned.dims["d"] * 4
    n_tokens = sum(t.numel() for t in parts) + sum(t.numel() for t in chosen_on)
    require_space(out, (2 * len(names) + 1) * n_tokens * per_token)
    with (
        tempfile.TemporaryDirectory(prefix=".hidden-", dir=out) as folder,
        disk_errors(out),
        torch.inference_mode(),
    ):
        work = Path(folder)
        full, cut = LayerwiseModel(original, dtype), LayerwiseModel(pruned, dtype)
        whole = Walk(full, chosen_on, work / "whole").nats()
        before = Walk(cut, chosen_on, work / "before").nats()
        reference = Walk(full, parts, work / "full")
        chains = [_start(name, cut, parts, chosen_on, work, before) for name in names]
        for done, gap in enumerate(gaps):
            reference.advance(gap.source)
            for at, chain in enumerate(chains):
                _step(chain, original, pruned, gap, reference)
                progress(done * len(chains) + at + 1, len(gaps) * len(chains))
    found = {c.name: Attempt(c.name, tuple(c.maps), tuple(c.log), c.nats) for c in chains}
    attempts = [found.get(n) or Attempt(n, refused=reason) for n, reason in refused.items()]
    return attempts, before, whole


def _start(
    name: str,
    cut: LayerwiseModel,
    parts: list[Tensor],
    chosen_on: list[Tensor],
    work: Path,
    before: float,
) -> Chain:
    keep_mlp = REPAIRS[name].features == "mlp"
    return Chain(
        name,
        Walk(cut, parts, work / f"{name}-calibration", keep_mlp=keep_mlp),
        Walk(cut, chosen_on, work / f"{name}-selection", keep_mlp=keep_mlp),
        before,
    )


def _step(
    chain: Chain, original: Checkpoint, pruned: Checkpoint, gap: Boundary, reference: Walk
) -> None:
    """Fit a repair at one gap; keep it if the selection text gets likelier."""
    where = {"position": gap.position, "dropped": list(gap.dropped)}
    reason = skipped(pruned, chain.made.kind, gap)
    if reason is not None:
        chain.log.append({**where, "skipped": reason})
        return
    chain.calibration.advance(gap.position)
    chain.selection.advance(gap.position)

    def activate(hidden: Tensor) -> Tensor:
        return reference.model.mlp_activations(gap.dropped[-1], hidden)

    found = _statistics(chain, original, pruned, gap)
    for (hidden, mlp), target in zip(chain.calibration.batches(), reference.hidden, strict=True):
        known = activate(hidden) if chain.made.features == "own" else mlp
        found.add(hidden, known, target)
    best, nats, options = _best(chain, found, gap, activate)
    before = perplexity(chain.nats / chain.selection.n_predicted)
    chain.log.append({**where, "before": before, "options": options, "kept": best is not None})
    if best is not None:
        chain.nats = nats
        chain.calibration.apply(best)
        chain.selection.apply(best)
        if isinstance(best, OwnMlp):
            best = dataclasses.replace(best, activate=None)  # lets the full model go
        chain.maps.append((gap, best))


def _best(
    chain: Chain, found: Statistics, gap: Boundary, activate: Callable[[Tensor], Tensor]
) -> tuple[Map | None, float, dict[str, float | None]]:
    """The map under which the selection text is likeliest, None where it is so without; its summed
    nats, and the perplexity under each."""
    options: dict[str, float | None] = {}
    best, nats = None, chain.nats
    for label, map_ in _fit(chain.made)(found):
        if isinstance(map_, OwnMlp):
            map_ = dataclasses.replace(
                map_, layer=gap.dropped[-1], activate=activate, constant=found.offset
            )
        after = chain.selection.nats(map_)
        options[label] = _finite(perplexity(after / chain.selection.n_predicted))
        if after < nats:
            best, nats = map_, after
    return best, nats, options


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _statistics(
    chain: Chain, original: Checkpoint, pruned: Checkpoint, gap: Boundary
) -> Statistics:
    width = pruned.dims["d"]
    start, offset = (
        projection(original, gap.dropped[-1]) if chain.made.kind == "own" else (None,) * 2
    )
    return Statistics(
        width,
        features=chain.made.features,
        basis=basis(width) if chain.made.rotated else None,
        epsilon=float(pruned.text.get("rms_norm_eps", 1e-6)),
        start=start,
        offset=offset,
    )


def _fit(made: Repair) -> Callable[[Statistics], list[tuple[str, Map]]]:
    module, _, function = made.target.partition(":")
    fit: Callable[[Statistics], list[tuple[str, Map]]] = getattr(
        importlib.import_module(module), function
    )
    return fit


def _write_best(
    original: Checkpoint,
    pruned: Checkpoint,
    plan: PrunePlan,
    attempts: list[Attempt],
    before: float,
    chosen_on: list[Tensor],
    out: Path,
    dtype: str,
    facts: dict[str, Any],
) -> tuple[Checkpoint, dict[str, Any]]:
    """Write the attempts in the order of their perplexity until one is better as written, too."""
    n_predicted = facts["tokens"]["selection"]
    after = before
    for attempt in sorted(attempts, key=lambda a: a.nats):
        if not attempt.nats < before:
            continue
        made, noted = write_repaired(original, pruned, plan, attempt.maps, out)
        after = selection_nats(made, chosen_on, dtype)
        facts["candidates"][attempt.name]["written"] = perplexity(after / n_predicted)
        if after < before:
            facts["kept"] = attempt.name
            facts["candidates"][attempt.name]["kept"] = True
            break
        for file in out.iterdir():
            file.unlink()
    if facts["kept"] is None:
        after = before
        made, noted = write_repaired(original, pruned, plan, (), out)
        facts["note"] = "no repair lowered the selection perplexity: the model is as it was"
    facts["selection_perplexity"]["repaired"] = perplexity(after / n_predicted)
    facts["n_layers"] = made.n_layers
    facts["slot_layers"] = [noted.keep.index(layer) for layer in noted.keep if layer in plan.drop]
    noted = dataclasses.replace(noted, facts={**noted.facts, "repair": facts})
    (out / PLAN_FILE).write_text(noted.to_json(), encoding="utf-8")
    return made, facts


def selection_nats(checkpoint: Checkpoint, parts: list[Tensor], dtype: str) -> float:
    """Summed nats of a checkpoint as it lies on disk."""
    model, total = LayerwiseModel(checkpoint, dtype), 0.0
    with torch.inference_mode():
        for tokens in parts:
            hidden = model.embed(tokens)
            for index in range(model.n_layers):
                hidden = model.layer(index, hidden)
            total += model.nats(hidden, tokens)
    return total


def _facts(attempt: Attempt, before: float, n_predicted: int) -> dict[str, Any]:
    """What plan.json and the user get to know of an attempt."""
    if attempt.refused is not None:
        return {"refused": attempt.refused}
    return {
        "before": perplexity(before / n_predicted),
        "after": perplexity(attempt.nats / n_predicted),
        "kept": False,
        "slot_layers": sum(isinstance(map_, (Slot, OwnMlp)) for _, map_ in attempt.maps),
        "gaps": list(attempt.log),
    }
