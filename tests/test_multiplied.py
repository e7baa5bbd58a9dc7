"""Parameters that a token is multiplied with, counted by hand, in every format."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx_ir as ir
import pytest

from shortstack.artifact import Artifact, ExportSpec
from shortstack.bench.models import benchable
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter
from shortstack.export.onnx_graph import multiplied_params
from shortstack.gguf_header import read_header
from shortstack.manifest import write_manifest
from shortstack.multiplied import Multiplied, of_checkpoint, of_gguf


def by_hand(checkpoint: Checkpoint) -> Multiplied:
    """Query and output, key and value, three of the MLP; the head is the table."""
    d = checkpoint.dims
    layer = 2 * d["d"] * d["q"] + 2 * d["d"] * d["kv"] + 3 * d["d"] * d["ff"]
    return Multiplied(d["layers"] * layer, d["vocab"] * d["d"])


def counted(artifact: Artifact) -> tuple[int | None, int | None]:
    return artifact.matmul_params, artifact.head_params


def test_a_checkpoint_counts_projections_and_head(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert of_checkpoint(checkpoint) == by_hand(checkpoint)
    found = benchable(str(tiny))
    assert counted(found) == (by_hand(checkpoint).matmul_params, by_hand(checkpoint).head_params)


@pytest.mark.parametrize("spec", ["gguf:F16", "gguf:Q4_0", "onnx:fp32", "onnx:int8", "onnx:int4"])
def test_an_export_counts_what_its_checkpoint_does(spec: str, tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    options = {"imatrix": "no"} if spec == "onnx:int4" else {}
    parsed = ExportSpec.parse(spec, **options)
    made = exporter(parsed.format).export(checkpoint, parsed, tmp_path)
    wanted = by_hand(checkpoint)
    assert counted(made) == (wanted.matmul_params, wanted.head_params)
    assert counted(benchable(str(made.path))) == counted(made)
    assert counted(Artifact.from_dict(made.to_dict(), made.path.parent)) == counted(made)


def test_an_older_artifact_does_not_know(tiny: Path) -> None:
    data = benchable(str(tiny)).to_dict()
    for name in ("matmul_params", "head_params"):
        del data[name]
    assert counted(Artifact.from_dict(data, tiny.parent)) == (None, None)


@pytest.mark.parametrize("spec", ["gguf:F16", "onnx:fp32"])
def test_an_export_of_an_older_version_is_counted_from_its_file(
    spec: str, tiny: Path, tmp_path: Path
) -> None:
    parsed = ExportSpec.parse(spec)
    made = exporter(parsed.format).export(Checkpoint.open(tiny), parsed, tmp_path)
    told = made.to_dict(tmp_path)
    for name in ("matmul_params", "head_params"):
        del told[name]
    write_manifest(tmp_path, "export", "key", {"artifact": told})
    assert counted(benchable(str(tmp_path))) == counted(made)


def test_of_experts_those_in_use_count_and_an_untied_table_does_not(tmp_path: Path) -> None:
    file = tmp_path / "moe.gguf"
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    shapes = {
        **{"token_embd.weight": (10, 4), "output.weight": (10, 4), "output_norm.weight": (4,)},
        **{
            "blk.0.attn_q.weight": (6, 4),
            "blk.0.attn_q.bias": (6,),
            "blk.0.attn_norm.weight": (4,),
        },
        **{"blk.0.ffn_gate_inp.weight": (8, 4), "blk.0.ffn_up_exps.weight": (8, 5, 4)},
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # Query 24, router 32, of eight experts of 20 two.
    assert of_gguf(read_header(file)) == Multiplied(24 + 32 + 2 * 20, 40)


def weight(name: str, *shape: int) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.zeros(shape, np.float32), name=name))
    value.shape = ir.Shape(shape)
    return value


def saved(given: ir.Value, nodes: list[ir.Node], weights: list[ir.Value], file: Path) -> Path:
    """A graph whose `logits` are the last node's output."""
    nodes[-1].outputs[0].name = "logits"
    graph = ir.Graph([given], nodes[-1].outputs, nodes=nodes, initializers=weights)
    ir.save(ir.Model(graph, ir_version=10), file)
    return file


def test_a_graph_is_followed_from_its_logits_to_the_head(tmp_path: Path) -> None:
    hidden = ir.Value(name="hidden")
    up, scale, head = weight("up", 6, 4), weight("scale", 1, 6), weight("head", 9, 6)
    turned = ir.node("Transpose", [up])
    product = ir.node("MatMul", [hidden, turned.outputs[0]])
    scaled = ir.node("MatMul", [product.outputs[0], scale])  # one row: no matrix
    same = ir.node("Identity", [head])
    turned_head = ir.node("Transpose", same.outputs)
    logits = ir.node("MatMul", [scaled.outputs[0], turned_head.outputs[0]])
    capped = ir.node("Tanh", logits.outputs)
    nodes = [turned, product, scaled, same, turned_head, logits, capped]
    file = saved(hidden, nodes, [up, scale, head], tmp_path / "model.onnx")
    assert multiplied_params(file) == Multiplied(24, 54)


def test_a_graph_with_unknown_weights_has_no_count(tmp_path: Path) -> None:
    hidden, head = ir.Value(name="hidden"), weight("head", 4, 9)
    experts = ir.node("MoE", [hidden], domain="com.microsoft")
    logits = ir.node("MatMul", [experts.outputs[0], head])
    assert (
        multiplied_params(saved(hidden, [experts, logits], [head], tmp_path / "moe.onnx"))
        == Multiplied()
    )
    given = ir.Value(name="hidden")
    plain = ir.node("Relu", [given])
    assert multiplied_params(saved(given, [plain], [], tmp_path / "plain.onnx")) == Multiplied()
