"""docs/plans.md: its example is run as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from shortstack.checkpoint import Checkpoint
from shortstack.prune import PrunePlan, apply_plan

PAGE = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")


def example(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_plan_merges_drops_and_removes(tiny: Path, tmp_path: Path) -> None:
    pruned = apply_plan(Checkpoint.open(tiny), PrunePlan.from_json(example("json")), tmp_path)
    before = load_file(tiny / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    mean = (before[name.format(2)].float() + before[name.format(3)].float()) / 2
    assert torch.equal(after[name.format(2)], mean.to(torch.bfloat16))
    assert torch.equal(after[name.format(3)], before[name.format(4)])
    assert pruned.removed == {"attention": (1,), "mlp": ()}


def test_the_example_replacement_takes_the_place_of_a_layer(tiny: Path, tmp_path: Path) -> None:
    block, out = tmp_path / "block.safetensors", tmp_path / "out"
    out.mkdir()
    code = example("python").replace("my-model", str(tiny)).replace("block.safetensors", str(block))
    exec(compile(code, "docs/plans.md", "exec"), {})
    plan = {**json.loads(example("json")), "merge": {}, "replace": {"2": str(block)}}
    apply_plan(Checkpoint.open(tiny), PrunePlan.from_json(json.dumps(plan)), out)
    name = "model.layers.{}.mlp.up_proj.weight"
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after[name.format(2)], before[name.format(4)])
