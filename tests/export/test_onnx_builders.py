"""Each builder of ONNX graphs, on every model of the zoo: right, or refused with its reason."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tests import zoo
from tests.agreement import TOKENS, distance, run
from tests.zoo import NAMES, make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import MissingExtraError, ShortstackError, VerificationError
from shortstack.export import onnx_genai, onnx_mobius, to_onnx
from shortstack.export.onnx_builders import AUTO, choose

pytestmark = pytest.mark.usefixtures("no_children")
EXACT = 1e-4
"""Of the largest logit; measured: 1e-6."""


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("zoo") / request.param
    return Checkpoint.open(make_model(request.param, folder))


def of(name: str, folder: Path) -> Checkpoint:
    return Checkpoint.open(make_model(name, folder / name))


def export(checkpoint: Checkpoint, out: Path, target: str = "onnx:fp32", **options: str) -> Path:
    out.mkdir()
    return to_onnx.export(checkpoint, ExportSpec.parse(target, **options), out).path


def test_mobius_builds_every_model(model: Checkpoint, tmp_path: Path) -> None:
    """The support matrix holds its float32 graphs; here, what float16 may cost."""
    path = export(model, tmp_path / "out", "onnx:fp16", builder="mobius")
    assert distance(run(path, "onnxruntime"), run(model.path, "pytorch")) < 5e-3
    data = (path / "model.onnx.data").stat().st_size
    assert data < 2.2 * model.n_params + 500_000


def test_genai_builds_a_model_or_refuses_it(model: Checkpoint, tmp_path: Path) -> None:
    reason = onnx_genai.unsupported(model)
    if reason is None:
        path = export(model, tmp_path / "out", builder="genai")
        assert distance(run(path, "onnxruntime"), run(model.path, "pytorch")) < EXACT
        return
    with pytest.raises(ShortstackError, match="Try another builder: --option builder=mobius"):
        export(model, tmp_path / "out", builder="genai")
    with pytest.raises(ShortstackError, match="builder failed"):  # else our table is out of date
        onnx_genai.build(model, tmp_path / "scratch")


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo3", "phi4-mini"])
def test_the_folder_opens_in_genai(name: str, tmp_path: Path) -> None:
    checkpoint = of(name, tmp_path)
    path = export(checkpoint, tmp_path / "out")
    truth = run(checkpoint.path, "pytorch")
    assert distance(run(path, "onnxruntime-genai"), truth) < EXACT


@pytest.mark.parametrize("builder", ["mobius", "genai"])
@pytest.mark.parametrize("name", ["llama", "qwen3-window"])
def test_a_batch_computes_what_its_rows_compute(builder: str, name: str, tmp_path: Path) -> None:
    checkpoint = of(name, tmp_path)
    path = export(checkpoint, tmp_path / "out", builder=builder)
    session = onnxruntime.InferenceSession(
        str(path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    rows = np.array([TOKENS, TOKENS[::-1], TOKENS[7:] + TOKENS[:7]])
    sizes = checkpoint.dims
    empty = np.zeros((3, sizes["kv_heads"], 0, sizes["head_dim"]), np.float32)
    feeds = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_")}
    feeds |= {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    logits = session.run(["logits"], feeds)[0]
    assert distance(logits[0], run(path, "onnxruntime")) < EXACT
    for index in (1, 2):
        alone = {name: value[index : index + 1] for name, value in feeds.items()}
        assert distance(logits[index], session.run(["logits"], alone)[0][0]) < EXACT


@pytest.mark.parametrize("extra", ["mlp.up_proj.bias", "mlp.gate_proj.weight"])
def test_mobius_leaves_no_tensor_out(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It only logs tensors that it has no place for, and places that it has no tensor for."""
    checkpoint = of("llama", tmp_path)
    stored = onnx_mobius._tensors(checkpoint)
    name = f"model.layers.3.{extra}"
    if stored.pop(name, None) is None:
        stored[name] = stored["model.norm.weight"]
    monkeypatch.setattr(onnx_mobius, "_tensors", lambda _: stored)
    with pytest.raises(VerificationError, match=f"mobius (leaves out|expects) {name}"):
        onnx_mobius.build(checkpoint, tmp_path / "scratch")


@pytest.mark.parametrize("head_dim", [8, 24, 48])
def test_heads_that_the_fused_attention_has_not_are_refused(
    head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.ZOO, "odd", zoo.Specimen("Llama", {"head_dim": head_dim}))
    checkpoint = of("odd", tmp_path)
    if head_dim % 16 == 0:
        path = export(checkpoint, tmp_path / "out")
        assert distance(run(path, "onnxruntime"), run(checkpoint.path, "pytorch")) < EXACT
        return
    with pytest.raises(ShortstackError, match=f"heads in sixteens, not of {head_dim}"):
        export(checkpoint, tmp_path / "out")


def test_auto_takes_the_first_that_is_installed_and_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, phi = of("llama", tmp_path), of("phi3", tmp_path)
    assert choose(llama, AUTO)[0] == "mobius"
    monkeypatch.setattr(onnx_mobius, "PACKAGES", ("no_such_package",))
    assert choose(llama, AUTO)[0] == "genai"
    with pytest.raises(ShortstackError, match="no builder makes this model: .*phi3"):
        choose(phi, AUTO)
    with pytest.raises(MissingExtraError, match="the mobius builder needs"):
        choose(llama, "mobius")
    monkeypatch.setattr(onnx_genai, "PACKAGES", ("no_such_package",))
    with pytest.raises(MissingExtraError, match=r"shortstack\[onnx\]"):
        choose(llama, AUTO)


def test_a_builders_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = of("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai.models", None)
    with pytest.raises(MissingExtraError, match="the export to ONNX"):
        onnx_genai.build(checkpoint, tmp_path / "scratch")
