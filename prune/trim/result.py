"""A trimmed model as an ordinary checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families.table import PARTS
from shortstack.prune.apply import apply_plan
from shortstack.prune.plan import PrunePlan
from shortstack.prune.rewrite import rewrite
from shortstack.prune.trim.loop import Kept
from shortstack.prune.trim.model import Unit


def check_trimmable(checkpoint: Checkpoint) -> None:
    """Refuse what the loop would get wrong: the towers of a multimodal model, and sub-blocks that
    are gone already, which tuning would bring back. Raises ShortstackError."""
    if checkpoint.family.nested:
        raise ShortstackError(f"{checkpoint.path} is multimodal. Trim its text model alone.")
    if any(checkpoint.removed.values()):
        raise ShortstackError(
            f"{checkpoint.path} has lost sub-blocks already, which tuning would bring back. "
            "Trim the model that it was cut from."
        )


def plan_of(n_layers: int, gone: Iterable[Unit], facts: Mapping[str, Any]) -> PrunePlan:
    """The plan that takes the units of `gone` out; a layer that lost both halves is dropped."""
    lost = {kind: {unit.layer for unit in gone if unit.kind == kind} for kind in ("block", *PARTS)}
    drop = lost["block"] | (lost["attention"] & lost["mlp"])
    return PrunePlan(
        n_layers,
        tuple(sorted(drop)),
        "trim",
        facts=facts,
        attention=tuple(sorted(lost["attention"] - drop)),
        mlp=tuple(sorted(lost["mlp"] - drop)),
    )


def write_kept(
    checkpoint: Checkpoint, kept: Kept, work: Path, facts: Mapping[str, Any], out: Path
) -> Checkpoint:
    """Cut `checkpoint` as `kept` says and put in the tuned tensors, which lie in `work`.

    Weights keep the type that they are stored in. `out` is an existing empty folder. Raises
    ShortstackError for a full disk.
    """
    from safetensors.numpy import load_file

    plan = plan_of(checkpoint.n_layers, kept.gone, facts)
    tuned = load_file(work / kept.file)
    folder = Path(tempfile.mkdtemp(prefix=".cut-", dir=work))
    try:
        cut = apply_plan(checkpoint, plan, folder)
        names = {name: _renamed(checkpoint, plan, name) for name in tuned}
        changed = {new: tuned[old] for old, new in names.items() if new in cut.tensors}
        return rewrite(cut, changed, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _renamed(checkpoint: Checkpoint, plan: PrunePlan, name: str) -> str | None:
    """The name of a tensor after the cut; None for one that is cut away."""
    family = checkpoint.family
    layer = family.layer_of(name)
    if layer is None:
        return name
    rest = name.removeprefix(family.layer_prefix.format(i=layer))
    parts = ((plan.attention, "self_attn."), (plan.mlp, "mlp."))
    if layer in plan.drop or any(layer in p and rest.startswith(start) for p, start in parts):
        return None
    return family.layer_prefix.format(i=plan.keep.index(layer)) + rest
