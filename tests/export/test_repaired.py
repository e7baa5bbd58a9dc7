"""Repaired folders are ordinary ones: llama.cpp and onnxruntime compute what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.agreement import distance as agreement
from tests.agreement import run
from tests.zoo import make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter
from shortstack.prune import PrunePlan, apply_plan
from shortstack.prune.repair import REPAIRS, repair
from shortstack.prune.repair.boundaries import boundaries
from shortstack.prune.repair.fold import write_repaired
from shortstack.prune.repair.maps import Shift
from shortstack.tokens import Encoder

Distance = Callable[[Checkpoint, Path, str], tuple[float, float]]
PLAN = PrunePlan(6, (2, 3), "explicit")
RUNTIMES = {"gguf:F32": ("llama.cpp", 1e-5), "onnx:fp32": ("onnxruntime", 1e-6)}


@pytest.fixture(scope="module", params=REPAIRS)
def repaired(
    request: pytest.FixtureRequest,
    checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    """The tiny model with two layers dropped, and a repair that was kept."""
    cut, out = (tmp_path_factory.mktemp(name) for name in ("cut", "out"))
    pruned = apply_plan(checkpoint, PLAN, cut)
    licence = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    windows = Encoder(checkpoint).windows([licence], 32, 24)
    made, facts = repair(
        checkpoint, pruned, PLAN, windows[:16], windows[16:], out, method=request.param
    )
    assert facts["kept"] == request.param
    return made


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("target", RUNTIMES)
def test_a_kept_repair_runs_everywhere(
    target: str, repaired: Checkpoint, distance: Distance, tmp_path: Path
) -> None:
    spec = ExportSpec.parse(target)
    artifact = exporter(spec.format).export(repaired, spec, tmp_path)
    runtime, bound = RUNTIMES[target]
    assert max(distance(repaired, artifact.path, runtime)) < bound
    assert artifact.n_layers == repaired.n_layers


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("target", RUNTIMES)
def test_a_bias_of_granite_runs_everywhere(target: str, tmp_path: Path) -> None:
    original = Checkpoint.open(make_model("granite", tmp_path / "granite"))
    plan = PrunePlan(8, (2, 3), "explicit")
    cut, out, exported = (tmp_path / name for name in ("cut", "out", "exported"))
    for folder in (cut, out, exported):
        folder.mkdir()
    pruned = apply_plan(original, plan, cut)
    shift = Shift(torch.linspace(-1, 1, 64).double())
    made, _ = write_repaired(original, pruned, plan, [(boundaries(plan)[0], shift)], out)
    spec = ExportSpec.parse(target)
    artifact = exporter(spec.format).export(made, spec, exported)
    truth = run(made.path, "pytorch")
    assert agreement(run(artifact.path, RUNTIMES[target][0]), truth) < 2e-3
    assert agreement(run(pruned.path, "pytorch"), truth) > 0.05
