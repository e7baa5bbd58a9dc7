"""A sub-block that is said to be gone and is not: no exporter leaves it out."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.prune import apply_plan
from shortstack.prune.plan import PrunePlan

PLAN = PrunePlan(6, (), "explicit", attention=(2,), mlp=(4,))


@pytest.mark.parametrize(
    ("tensor", "gone"),
    [("2.self_attn.o_proj", "attention of layer 2"), ("4.mlp.down_proj", "mlp of layer 4")],
)
def test_a_projection_that_still_writes_is_refused(
    tensor: str, gone: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, out = tmp_path / "pruned", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    apply_plan(checkpoint, PLAN, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{tensor}.weight"][3, 5] = 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortstackError, match=gone):
        exporter("gguf").export(Checkpoint.open(folder), ExportSpec.parse("gguf:F32"), out)
    assert list(out.iterdir()) == []


def test_the_least_runtime_is_recorded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = {}
    for name, plan in (("whole", PrunePlan(6, (1,), "explicit")), ("sub-block", PLAN)):
        folder, out = tmp_path / name, tmp_path / f"{name}-out"
        folder.mkdir()
        out.mkdir()
        pruned = apply_plan(checkpoint, plan, folder)
        made[name] = exporter("gguf").export(pruned, ExportSpec.parse("gguf:F32"), out)
    assert made["whole"].least_runtime is None
    assert made["sub-block"].least_runtime == "llama-cpp-python 0.3.36"
