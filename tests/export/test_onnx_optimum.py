"""optimum's graph of every model of the zoo, whole and cut, agrees with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import transformers
from numpy.typing import NDArray
from tests.agreement import TOKENS, distance, run
from tests.columns import mismatches
from tests.zoo import NAMES, make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import onnx_optimum, to_onnx
from shortstack.prune import PrunePlan, apply_plan
from shortstack.runtimes import open_session

# by the version, not by the package: where 4.57 is installed, a missing optimum is a failure
pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("4."),
    reason="optimum-onnx wants transformers 4.57, an environment of its own: make test-optimum",
)
PROMPT = 48
TOLERANCE = 1e-4
"""Of the largest logit."""
CUTS: dict[str, tuple[int, ...]] = {"whole": (), "1,4,6": (1, 4, 6)}


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return CUTS[request.param]


@pytest.fixture(params=NAMES)
def checkpoint(request: pytest.FixtureRequest, cut: tuple[int, ...], tmp_path: Path) -> Checkpoint:
    original = Checkpoint.open(make_model(request.param, tmp_path / "model"))
    return pruned(original, PrunePlan(original.n_layers, cut, "explicit"), tmp_path)


def pruned(original: Checkpoint, plan: PrunePlan, folder: Path) -> Checkpoint:
    if plan == PrunePlan(original.n_layers, (), plan.method):
        return original
    (folder / "pruned").mkdir()
    return apply_plan(original, plan, folder / "pruned")


class Opened:
    """The graph in onnxruntime: rows of one length, cached keys and values handed on."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        ir.save(model, folder / "saved.onnx")
        onnxruntime.set_default_logger_severity(4)
        self._session = onnxruntime.InferenceSession(
            str(folder / "saved.onnx"), providers=["CPUExecutionProvider"]
        )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def logits(
        self, rows: Sequence[Sequence[int]], mask: NDArray[np.int64], prompt: int
    ) -> NDArray[np.float32]:
        """(rows, tokens, vocabulary): the first `prompt` tokens at once, then one by one."""
        tokens, found = np.array(rows, np.int64), []
        past = {
            name: np.zeros((len(rows), value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in self._inputs.items()
            if name.startswith("past_key_values.")
        }
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]:
            given: dict[str, Any] = {
                "input_ids": tokens[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
                **past,
            }
            given = {name: value for name, value in given.items() if name in self._inputs}
            made = dict(zip(self._outputs, self._session.run(None, given), strict=True))
            past = {name: made[name.replace("past_key_values", "present")] for name in past}
            found.append(made["logits"])
        return np.concatenate(found, axis=1)


def truth(folder: Path) -> NDArray[np.float32]:
    with open_session(folder, "pytorch", threads=1, context_tokens=len(TOKENS)) as session:
        return session.prefill(TOKENS, all_logits=True)


def test_the_graph_is_right_alone_and_in_a_batch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert onnx_optimum.unsupported(checkpoint) is None
    opened = Opened(onnx_optimum.build(checkpoint, tmp_path / "scratch"), tmp_path)
    expected = truth(checkpoint.path)
    for count in (1, 3):
        found = opened.logits([TOKENS] * count, np.ones((count, len(TOKENS)), np.int64), PROMPT)
        for row in found:
            assert distance(row, expected) <= TOLERANCE


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["llama", "phi4-mini", "gemma2", "gemma3", "smollm3", "olmo3"])
def test_removed_sub_blocks_leave_the_graph(name: str, precision: str, tmp_path: Path) -> None:
    """The first layer's cache, too, from whose length these graphs take the mask's."""
    original = Checkpoint.open(make_model(name, tmp_path / "model"))
    plan = PrunePlan(original.n_layers, (), "explicit", attention=(0, 3), mlp=(5,))
    checkpoint = pruned(original, plan, tmp_path)
    (tmp_path / "out").mkdir()
    made = to_onnx.export(checkpoint, ExportSpec.parse(f"onnx:{precision}"), tmp_path / "out")
    assert made.notes[0] == "graph by optimum"
    expected = run(checkpoint.path, "pytorch")
    bound = {"fp32": TOLERANCE, "fp16": 5e-3, "int8": 0.1}[precision]
    assert distance(run(made.path, "onnxruntime"), expected) <= bound
    names = [value.name for value in ir.load(made.path / "model.onnx").graph.inputs]
    assert sum(".key" in str(name) for name in names) == original.n_layers - 2
    if precision == "fp32":  # two attentions and an MLP: none of their weights is stored
        size = (made.path / "model.onnx.data").stat().st_size
        layer = 4 * (original.n_params - 2 * 512 * 64) // original.n_layers
        assert size < 4 * original.n_params - layer


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_finds_the_importance_of_what_it_reads(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model(name, tmp_path / "model"))
    count, wrong = mismatches(checkpoint, onnx_optimum.build(checkpoint, tmp_path / "scratch"))
    assert count >= 4 * checkpoint.n_layers
    assert not wrong


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("name", ["llama", "phi4-mini", "gemma3"])
def test_int4_is_rounded_by_importance(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model(name, tmp_path / "model"))
    (tmp_path / "out").mkdir()
    spec = ExportSpec.parse("onnx:int4")
    made = to_onnx.export(checkpoint, spec, tmp_path / "out", calibration=[TOKENS])
    assert any("importance from 64 tokens" in note for note in made.notes)
    assert not any("without importance" in note for note in made.notes)
    assert distance(run(made.path, "onnxruntime"), run(checkpoint.path, "pytorch")) < 0.5


def test_inputs_and_outputs_are_those_of_the_contract(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model("llama", tmp_path / "model"))
    graph = onnx_optimum.build(checkpoint, tmp_path / "scratch").graph
    layers = [(i, kind) for i in range(checkpoint.n_layers) for kind in ("key", "value")]
    past = {f"past_key_values.{i}.{kind}" for i, kind in layers}
    assert {value.name for value in graph.inputs} == past | {
        "input_ids",
        "attention_mask",
        "position_ids",
    }
    present = {f"present.{i}.{kind}" for i, kind in layers}
    assert {value.name for value in graph.outputs} == present | {"logits"}
    assert {value.dtype for value in graph.outputs} == {ir.DataType.FLOAT}


def test_a_rotation_that_transformers_4_cannot_express_is_refused(tmp_path: Path) -> None:
    folder = make_model("gemma3", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    config["rope_parameters"] = {"full_attention": scaled, "sliding_attention": scaled}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    words = "transformers 4 cannot give the sliding layers a rotation of their own"
    assert words in str(onnx_optimum.unsupported(checkpoint))
    with pytest.raises(ShortstackError, match=words):
        onnx_optimum.build(checkpoint, tmp_path / "scratch")


def test_what_optimum_raises_becomes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(make_model("olmo3", tmp_path / "model"))
    monkeypatch.setattr(onnx_optimum, "CALLED", {})
    with pytest.raises(ShortstackError, match="optimum failed: ValueError: .*olmo3") as caught:
        onnx_optimum.build(checkpoint, tmp_path / "scratch")
    assert "\n" not in str(caught.value)
