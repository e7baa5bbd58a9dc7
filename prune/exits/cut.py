"""One exit as an ordinary model: the base's first k layers, the exit's own, its norm, the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint, TensorInfo
from shortstack.errors import ShortstackError
from shortstack.exits.folder import ExitFolder
from shortstack.families.table import PARTS
from shortstack.progress import OnProgress, silent
from shortstack.prune.apply import PLAN_FILE, noted, prepare
from shortstack.prune.plan import PrunePlan
from shortstack.prune.rewrite import rewrite
from shortstack.prune.sources import Copy


@dataclass(frozen=True)
class ExitCut:
    """What a model of k + 1 layers is made of, known from headers alone."""

    plan: PrunePlan
    """Of the base: its last layer stays, in whose place the exit's own goes."""
    config: Mapping[str, Any]
    names: Mapping[str, str]
    """Tensor of the new model -> tensor of the base, for those that are the base's."""
    own: Mapping[str, str]
    """Tensor of the new model -> tensor of the exit, as `ExitFolder.load` names it."""

    def checkpoint(self, base: Checkpoint, exits: ExitFolder, exit: int) -> Checkpoint:
        """The model as headers: config and shapes, before anything is written."""
        held = exits.headers()
        stored = {new: base.tensors[old] for new, old in self.names.items()}
        stored |= {new: held[f"exits.{exit}.{name}"] for new, name in self.own.items()}
        return Checkpoint(
            base.path, self.config, {n: TensorInfo("", i.dtype, i.shape) for n, i in stored.items()}
        )


def exit_cut(base: Checkpoint, exits: ExitFolder, exit: int) -> ExitCut:
    """Plan the model of an exit; fields of the config that speak of single layers follow.

    Raises ShortstackError for an exit that is not there, and for a base whose last layer lost a
    sub-block while exits have a layer.
    """
    exits.check_exit(exit)
    last = base.n_layers - 1
    if exits.has_layers and any(last in base.removed[part] for part in PARTS):
        raise ShortstackError(
            f"the last layer of {base.path} lost a sub-block, so exits cannot be layers of its "
            "kind. Train them with --init norm-only, or on another model."
        )
    plan = PrunePlan(
        base.n_layers,
        tuple(range(exit, last if exits.has_layers else last + 1)),
        "exit",
        facts={"exit": exit, "init": exits.init},
    )
    surgery = prepare(base, plan)
    own = {}
    for stored, rule in exits.names(base, exit):
        inside = stored.removeprefix(f"exits.{exit}.")
        is_layer = inside.startswith("layer.")
        own[base.family.layer_name(exit, rule) if is_layer else rule.hf] = inside
    names = {
        new: source.name
        for new, source in surgery.source.items()
        if isinstance(source, Copy) and new not in own
    }
    return ExitCut(plan, surgery.config, names, own)


def write_exit(
    base: Checkpoint,
    exits: ExitFolder,
    exit: int,
    out: Path,
    *,
    progress: OnProgress = silent,
) -> Checkpoint:
    """Write the model of an exit into the existing empty folder `out` and reopen it.

    The base's tensors are copied byte for byte, tokenizer files too. Progress counts tensors.
    """
    cut = exit_cut(base, exits, exit)
    tensors = exits.load(exit)
    changed: dict[str, NDArray[np.float32]] = {
        new: tensors[name].float().numpy() for new, name in cut.own.items()
    }
    made = rewrite(
        base, changed, out, dtype=exits.dtype, config=cut.config, names=cut.names, progress=progress
    )
    (out / PLAN_FILE).write_text(noted(base, cut.plan).to_json(), encoding="utf-8")
    return made
