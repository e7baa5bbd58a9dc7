"""Cut layers out of a checkpoint, file to file: byte ranges are copied, no model is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.errors import ShortstackError, one_line, require
from shortstack.families import REMOVED, both_spellings, rotates
from shortstack.progress import OnProgress, silent
from shortstack.prune.per_layer import cut_config
from shortstack.prune.plan import PrunePlan
from shortstack.prune.sources import Source, plan_sources
from shortstack.shards import (
    MAX_SHARD_BYTES,
    Layout,
    ShardReader,
    ShardWriter,
    lay_out,
)

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Surgery:
    """All that will be written, known before the first byte is."""

    config: dict[str, Any]
    source: Mapping[str, Source]
    layout: Layout

    @property
    def config_text(self) -> str:
        return json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"


def prepare(checkpoint: Checkpoint, plan: PrunePlan, max_shard: int = MAX_SHARD_BYTES) -> Surgery:
    """Work out names, shards and config. Raises ShortstackError if the plan does not fit."""
    if plan.n_layers != checkpoint.n_layers:
        raise ShortstackError(
            f"the plan is for {plan.n_layers} layers, {checkpoint.path} has "
            f"{checkpoint.n_layers}. Plan again for this model."
        )
    config = both_spellings(cut_config(checkpoint.config, plan.n_layers, plan.keep))
    sources = dict(plan_sources(checkpoint, plan))
    layout = lay_out(((new, s.dtype, s.shape) for new, s in sources.items()), max_shard)
    return Surgery(_with_removed(checkpoint, config, plan), sources, layout)


def _with_removed(
    checkpoint: Checkpoint, config: dict[str, Any], plan: PrunePlan
) -> dict[str, Any]:
    """Note in the config which sub-blocks are gone, beside those of an earlier cut."""
    nested = checkpoint.family.nested
    level = dict(config[nested]) if nested else config
    new_number = {old: new for new, old in enumerate(plan.keep)}
    before = {str(part): layers for part, layers in checkpoint.removed.items()}
    gone = {
        part: [
            new_number[layer]
            for layer in plan.keep
            if layer in layers or _stays_removed(plan, layer, before.get(part, ()))
        ]
        for part, layers in (("attention", plan.attention), ("mlp", plan.mlp))
    }
    empty = sorted(set(gone["attention"]) & set(gone["mlp"]))
    if empty:
        raise ShortstackError(
            f"nothing of layer {plan.keep[empty[0]]} would be left: its other sub-block is gone "
            "already. Drop the whole layer."
        )
    level.pop(REMOVED, None)
    if any(gone.values()):
        level[REMOVED] = gone
    return {**config, nested: level} if nested else level


def _stays_removed(plan: PrunePlan, layer: int, gone: Sequence[int]) -> bool:
    """Whether a sub-block that an earlier cut emptied in the layers `gone` is still empty here:
    a replaced layer has its own, a merged one those of the layers that it is made of."""
    if layer in plan.replace:
        return False
    made_of = [source for source, weight in plan.merge.get(layer, {layer: 1.0}).items() if weight]
    return all(source in gone for source in made_of)


def apply_plan(
    checkpoint: Checkpoint, plan: PrunePlan, out: Path, *, progress: OnProgress = silent
) -> Checkpoint:
    """Write the pruned model into the existing empty folder `out` and reopen it.

    Weights keep their type and bytes, tokenizer files are copied byte for byte. Progress counts
    tensors. Raises ShortstackError for a plan that does not fit, and for a full disk.
    """
    surgery = prepare(checkpoint, plan)
    require_space(out, surgery.layout.n_bytes)
    with disk_errors(out):
        with ShardReader(checkpoint) as reader, ShardWriter(out, surgery.layout) as writer:
            for done, name in enumerate(writer.names, 1):
                writer.write(name, surgery.source[name].chunks(reader))
                progress(done, len(surgery.source))
        (out / "config.json").write_text(surgery.config_text, encoding="utf-8")
        (out / PLAN_FILE).write_text(noted(checkpoint, plan).to_json(), encoding="utf-8")
        for file in checkpoint.tokenizer_files:
            shutil.copyfile(file, out / file.name)
    pruned = Checkpoint.open(out)
    check_loadable(pruned)
    return pruned


def noted(checkpoint: Checkpoint, plan: PrunePlan) -> PrunePlan:
    """Note which layers of the original rotate, if not all: a refused export says which cuts keep
    that rhythm."""
    kinds = list(rotates(checkpoint.family, checkpoint.text))
    if all(kinds):
        return plan
    return dataclasses.replace(plan, facts={**plan.facts, "rotates": kinds})


def check_loadable(checkpoint: Checkpoint) -> None:
    """Ask transformers, on the meta device, whether it wants exactly these tensors.

    A second opinion: our own table already agreed when the folder was opened.
    """
    require(("torch", "transformers", "safetensors"), "prune", "checking a pruned model")
    import torch
    from transformers import AutoModelForCausalLM

    from shortstack.pretrained import config_of

    try:
        config = config_of(checkpoint.path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ShortstackError:
        raise
    except Exception as error:  # what transformers raises for a bad field has no class in common
        raise ShortstackError(
            f"transformers refuses config.json: {type(error).__name__}: "
            f"{one_line(str(error), 300)} Mend the field or download the folder again."
        ) from None
    if checkpoint.family.nested:  # saved under other names than loaded: opening it is the test
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = {name: info.shape for name, info in checkpoint.tensors.items()}
    if checkpoint.tied:
        wanted.pop(checkpoint.family.head.hf, None)
    differing = sorted(name for name in wanted.keys() | held if wanted.get(name) != held.get(name))
    if differing:
        name = differing[0]
        raise ShortstackError(
            f"{checkpoint.path}: tensor {name} is {held.get(name, 'missing')}, transformers "
            f"expects {wanted.get(name, 'none')} ({len(differing)} such). Report this model."
        )
