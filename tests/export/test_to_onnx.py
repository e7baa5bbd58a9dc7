"""ONNX folders, opened by the real onnxruntime and held against float32 PyTorch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter, to_onnx
from shortstack.export.onnx_graph import bytes_per_token

Distance = Callable[[Checkpoint, Path, str], tuple[float, float]]
MakeVariant = Callable[..., Checkpoint]


def spec(precision: str, **options: str) -> ExportSpec:
    return ExportSpec.parse(f"onnx:{precision}", **options)


WINDOWS = [[(37 * row + 11 * column) % 504 + 8 for column in range(64)] for row in range(8)]
"""Tokens without a meaning: what they say of channels is still a model's own."""


def export(checkpoint: Checkpoint, wanted: ExportSpec, out: Path) -> Artifact:
    out.mkdir()
    return to_onnx.export(checkpoint, wanted, out, calibration=WINDOWS)


@pytest.mark.parametrize("name", ["llama-biases", "llama3-rope", "mistral-untied", "wide-heads"])
def test_fp32_computes_what_the_checkpoint_computes(
    name: str, make_variant: MakeVariant, distance: Distance, tmp_path: Path
) -> None:
    checkpoint = make_variant(name)
    artifact = export(checkpoint, spec("fp32"), tmp_path / "out")
    assert max(distance(checkpoint, artifact.path, "onnxruntime")) < 1e-6


@pytest.mark.parametrize(
    ("wanted", "bound", "bits"),
    [
        (spec("int8"), 0.01, 9.1),
        (spec("int4", imatrix="no", wide="down+qkv"), 0.1, 7.2),
        (spec("int4", imatrix="no"), 0.15, 6.4),
        (spec("int4", imatrix="no", wide="none", head="int4"), 0.3, 5.1),
        (spec("int4"), 0.2, 5.1),
        (spec("int4", head="int8", wide="down"), 0.1, 6.4),
    ],
    ids=lambda value: value.slug if isinstance(value, ExportSpec) else "",
)
def test_each_precision_is_as_near_as_its_bits_allow(
    wanted: ExportSpec,
    bound: float,
    bits: float,
    checkpoint: Checkpoint,
    distance: Distance,
    tmp_path: Path,
) -> None:
    artifact = export(checkpoint, wanted, tmp_path / "out")
    assert max(distance(checkpoint, artifact.path, "onnxruntime")) < bound
    predicted = to_onnx.predict(checkpoint, wanted)["size_bytes"]
    assert predicted == pytest.approx(artifact.size_bytes, rel=0.12)
    per_weight = 8 * artifact.weight_bytes_per_token / checkpoint.n_params
    assert per_weight == pytest.approx(bits, abs=0.1)


@pytest.mark.parametrize("wanted", [spec("int8"), spec("int4"), spec("int4", imatrix="no")])
def test_an_untied_embedding_is_not_taken_from_the_head(
    wanted: ExportSpec, make_variant: MakeVariant, distance: Distance, tmp_path: Path
) -> None:
    def other_head(tensors: dict[str, object]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0)  # type: ignore[attr-defined]  # a torch tensor

    checkpoint = make_variant(edit=other_head, tie_word_embeddings=False)
    artifact = export(checkpoint, wanted, tmp_path / "out")
    assert max(distance(checkpoint, artifact.path, "onnxruntime")) < 0.3
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    kept_float = [t.name for t in floats if list(t.dims) == [512, 64]]
    assert not kept_float


def test_both_onnx_runtimes_agree_and_a_moved_folder_opens(
    checkpoint: Checkpoint, distance: Distance, tmp_path: Path
) -> None:
    artifact = export(checkpoint, spec("fp32"), tmp_path / "out")
    moved = shutil.move(artifact.path, tmp_path / "elsewhere")
    assert max(distance(checkpoint, Path(moved), "onnxruntime-genai")) < 1e-6
    assert not list(Path(moved).glob(".*"))
    for file in checkpoint.tokenizer_files:
        assert (Path(moved) / file.name).read_bytes() == file.read_bytes()
    # float32, tied: every weight once, the tables of cosines not at all; and two whole numbers
    assert bytes_per_token(Path(moved) / "model.onnx") == 4 * checkpoint.n_params + 16


def test_a_long_step_says_how_far_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    wanted, told = spec("int4", imatrix="no"), lambda *step: seen.append(step)
    to_onnx.export(checkpoint, wanted, tmp_path / "out", progress=told)
    assert len(seen) > 30
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1


@pytest.mark.parametrize("limit", [600_000, 250_000], ids=["builder", "data file"])
def test_a_full_disk_is_one_clear_line(
    limit: int, checkpoint: Checkpoint, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    wanted = spec("fp32", builder="genai") if limit == 600_000 else spec("int8")
    (tmp_path / "out").mkdir()
    small_files(limit)
    with pytest.raises(ShortstackError, match="disk full while writing"):
        to_onnx.export(checkpoint, wanted, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (spec("int-4"), "Did you mean 'int4'"),
        (spec("int4", haed="int8"), "Did you mean 'head'"),
        (spec("int4", head="int6"), "unknown value of head 'int6'"),
        (spec("int8", wide="down"), "int8 has no option 'wide'"),
        (spec("int8", imatrix="yes"), "int8 has no option 'imatrix'"),
        (spec("int4", imatrix="maybe"), "unknown value of imatrix 'maybe'"),
        (spec("fp32", block="32"), "it has: builder"),
        (spec("int4", block="128"), "cannot be cut into blocks of 128"),
    ],
)
def test_a_spec_it_cannot_realise_is_refused(
    wanted: ExportSpec, words: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(ShortstackError, match=words):
        exporter("onnx").check(checkpoint, wanted)


def test_an_unknown_precision_is_refused_where_text_is_asked_for(checkpoint: Checkpoint) -> None:
    with pytest.raises(ShortstackError, match="Did you mean 'int4'"):
        to_onnx.calibrates(checkpoint, spec("int-4"))


def test_importance_brings_all_int4_nearer(
    make_variant: MakeVariant, tokens: list[int], distance: Distance, tmp_path: Path
) -> None:
    """Calibrated on other text than compared on would be fairer; here the mechanism is shown."""

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        """The same function, but layers read channels of unlike size, as those of real models."""
        sizes = torch.exp(0.4 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
        for name, tensor in tensors.items():
            if "_layernorm" in name:
                tensors[name] = tensor * sizes
            elif re.search(r"\b(q|k|v|gate|up)_proj", name):
                tensors[name] = tensor / sizes

    checkpoint, kl = make_variant(edit=spread), {}
    for choice in ("no", "yes"):
        out, wanted = tmp_path / choice, spec("int4", imatrix=choice, head="int4", wide="none")
        out.mkdir()
        made = to_onnx.export(checkpoint, wanted, out, calibration=[tokens])
        kl[choice] = sum(distance(checkpoint, made.path, "onnxruntime"))
        assert any("importance from 96 tokens" in n for n in made.notes) == (choice == "yes")
        assert not list(out.glob(".*"))
    assert kl["yes"] < 0.8 * kl["no"]


def test_importance_asks_for_text_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert to_onnx.calibrates(checkpoint, spec("int4"))
    assert not to_onnx.calibrates(checkpoint, spec("int4", imatrix="no"))
    assert not to_onnx.calibrates(checkpoint, spec("int8"))
    with pytest.raises(ShortstackError, match="no calibration text .* or imatrix=no"):
        to_onnx.export(checkpoint, spec("int4"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_importance_int4_gets_bits_instead() -> None:
    same = {"block": "32", "activations": "float32"}
    blind = {**same, "imatrix": "no", "head": "int8", "wide": "down"}
    assert to_onnx.settings(spec("int4", imatrix="no")) == blind
    assert to_onnx.settings(spec("int4", imatrix="no", head="int4")) == {**blind, "head": "int4"}
    weighed = {**same, "imatrix": "yes", "head": "int4", "wide": "none"}
    assert to_onnx.settings(spec("int4")) == weighed
    assert to_onnx.settings(spec("int4", wide="down")) == {**weighed, "wide": "down"}


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ShortstackError, match="Known: gguf, onnx"):
        exporter("tflite")


@pytest.mark.parametrize("builder", ["mobius", "genai"])
@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rotation: rotation["rope_type"],
)
def test_each_rotation_is_right(
    builder: str,
    rotation: dict[str, object],
    make_variant: MakeVariant,
    distance: Distance,
    tmp_path: Path,
) -> None:
    """genai's own YaRN is wrong (KL 0.59): the tables in the graph are transformers' own."""
    checkpoint = make_variant(rope_parameters={"rope_theta": 1e4, **rotation})
    artifact = export(checkpoint, spec("fp32", builder=builder), tmp_path / "out")
    assert max(distance(checkpoint, artifact.path, "onnxruntime")) < 1e-6


def test_a_rotation_that_is_no_table_is_refused(make_variant: MakeVariant) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ShortstackError, match="'dynamic' cannot be exported"):
        to_onnx.check(make_variant(rope_parameters=dynamic), spec("fp32"))


def test_float16_is_refused_where_activations_overflow(
    make_variant: MakeVariant, tokens: list[int], tmp_path: Path
) -> None:
    def loud(tensors: dict[str, object]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] *= 3e5  # type: ignore[operator]  # a tensor

    (tmp_path / "out").mkdir()
    with pytest.raises(ShortstackError, match=r"beyond the 65504 .* Export to fp32, int8 or int4"):
        to_onnx.export(
            make_variant(edit=loud), spec("fp16"), tmp_path / "out", calibration=[tokens]
        )
    assert not list((tmp_path / "out").iterdir())
