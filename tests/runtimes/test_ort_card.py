"""onnxruntime on a real NVIDIA card against the CPU. Skips, and says why, where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter
from shortstack.runtimes import open_session

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime has no CUDA provider: it was not tried on a card",
)
PROMPT = [(37 * place) % 400 + 8 for place in range(40)]
ON_THE_CPU = {"Cast", "Gather", "Shape", "Sub", "ReduceSum"}
"""Arithmetic on lengths, which onnxruntime gives to the CPU on purpose."""
SPECS = {
    "fp16": ExportSpec.parse("onnx:fp16"),
    "int4": ExportSpec.parse("onnx:int4", imatrix="no", activations="float16"),
}
ROUNDING = {"fp16": 0.01, "int4": 0.05}
"""Of the largest logit: CUDA multiplies 4-bit weights in float16, the CPU rounds activations to 8
bits. Seen on an H100: 0.0025 and 0.020."""


@pytest.fixture(scope="module", params=SPECS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    model = Checkpoint.open(Path(__file__).parents[1] / "data" / "tiny")
    exporter("onnx").export(model, SPECS[request.param], out)
    return out


def test_a_card_computes_what_the_cpu_computes(exported: Path) -> None:
    kind = next(name for name in SPECS if exported.name.startswith(name))
    with (
        open_session(exported, "onnxruntime", threads=2, context_tokens=64) as host,
        open_session(
            exported, "onnxruntime", threads=2, context_tokens=64, device="cuda:0"
        ) as card,
    ):
        expected = [host.prefill(PROMPT), host.decode(9)]
        found = [card.prefill(PROMPT), card.decode(9)]
        everything = card.prefill(PROMPT, all_logits=True)
        assert np.array_equal(everything[-1], found[0])  # its last row came over alone
        left = card.info["cpu_nodes"]
    for one, other in zip(expected, found, strict=True):
        assert np.abs(one - other).max() < ROUNDING[kind] * np.abs(one).max()
    assert set(left) <= ON_THE_CPU
