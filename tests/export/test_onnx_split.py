"""Graphs cut between layers compute what the whole one does, and what a prompt can leave at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.early_exits import ANSWERS, opened, prompts_of

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.early_exit.rule import PROBE, Rule
from shortstack.early_exit.rule_file import write_rule
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.export.onnx_split import split
from shortstack.prune.early_exit.classifier import top_rule
from shortstack.prune.early_exit.fit import features_of
from shortstack.prune.early_exit.states import collect
from shortstack.runtimes.ort_early_exit import OrtAnswerer
from shortstack.runtimes.pytorch_early_exit import Answerer

pytest.importorskip("onnxruntime")
CUTS = (2, 4)


@pytest.fixture(scope="module")
def export(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    spec = ExportSpec.parse("onnx:fp32")
    return exporter("onnx").export(Checkpoint.open(tiny), spec, folder).path


@pytest.fixture(scope="module")
def cut(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split")
    split(export, CUTS, out, "ab" * 32)
    return out


def rule(threshold: float, **more: Any) -> Rule:
    draw = np.random.default_rng(0)
    weights, bias = top_rule(len(CUTS), 3)
    return Rule(
        *(CUTS, PROBE, weights, bias, threshold),
        answers=ANSWERS,
        probe=draw.normal(size=(2, 2, 64)).astype(np.float32) * 0.3,
        probe_bias=np.zeros((2, 2), np.float32),
        **more,
    )


def test_all_graphs_together_are_the_whole_model(tiny: Path, cut: Path) -> None:
    prompts = prompts_of(tiny, 8)
    whole = Answerer(opened(tiny)).answer(prompts)
    ours = [OrtAnswerer(cut).answer_tokens(p.tokens, p.answers) for p in prompts]
    assert ours == whole


def test_prompts_leave_as_in_pytorch(tiny: Path, cut: Path) -> None:
    prompts = prompts_of(tiny, 24, seed=3)
    model = opened(tiny)
    features, _ = features_of(model, rule(0.0), collect(model, prompts, CUTS))
    tops = np.sort(features[..., 0], axis=0)
    # half leave at each check; between two scores, since runtimes round differently
    bias = -(tops[11] + tops[12]) / 2
    chosen = dataclasses.replace(rule(0.0), bias=bias.astype(np.float32))
    ours = OrtAnswerer(cut, chosen)
    found = [ours.answer_tokens(prompt.tokens, prompt.answers) for prompt in prompts]
    assert found == Answerer(model, chosen).answer(prompts)
    assert {answer.n_layers for answer in found} == {2, 4, 6}


def test_weights_lie_there_once(export: Path, cut: Path) -> None:
    assert (cut / "model.onnx.data").stat().st_size == (export / "model.onnx.data").stat().st_size
    graphs = sum(file.stat().st_size for file in cut.glob("segment-*.onnx"))
    assert graphs < 2 * (export / "model.onnx").stat().st_size


@pytest.mark.parametrize("cuts", [(), (0,), (6,), (4, 2)])
def test_cuts_that_cannot_be_are_refused(export: Path, tmp_path: Path, cuts: Any) -> None:
    with pytest.raises(ShortstackError, match="cannot be cut after"):
        split(export, cuts, tmp_path, "")
    assert list(tmp_path.iterdir()) == []


def test_rules_for_other_cuts_are_refused(cut: Path) -> None:
    other = rule(0.5)
    moved = Rule(**{**vars(other), "layers": (2, 3)})
    with pytest.raises(ShortstackError, match="is cut after 2, 4"):
        OrtAnswerer(cut, moved)
    plain = Rule(**{**vars(other), "check": "answers"})
    with pytest.raises(ShortstackError, match="Fit one with --check probe"):
        OrtAnswerer(cut, plain)


def test_the_commands_split_and_evaluate(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_children: None,
) -> None:
    from tests.test_trim_command import write
    from tests.trimming import made_up

    export = tmp_path / "export"
    assert main(["export", str(tiny), "--to", "onnx:fp32", "-o", str(export), "--json"]) == 0
    sha256 = Checkpoint.open(tiny).sha256
    facts = {"style": {"name": "words", "examples": ""}}
    file = tmp_path / "exit.safetensors"
    write_rule(rule(0.6, model_sha256=sha256, n_layers=6, facts=facts), file)
    out = tmp_path / "split"
    assert main(["exits", "split", str(export), "--early-exit", str(file), "-o", str(out)]) == 0
    context = Checkpoint.open(tiny).config["max_position_embeddings"]
    assert OrtAnswerer(out).context_tokens == context
    capsys.readouterr()
    rows = write(tmp_path / "test.jsonl", made_up(12, seed=9))
    command = ["eval", str(out), "--choice", rows, "--early-exit", str(file), "--json", "-o"]
    assert main([*command, str(tmp_path / "scores")]) == 0
    told = json.loads(capsys.readouterr().out)
    (result,) = told["results"]
    assert (told["runtime"], told["dtype"]) == ("onnxruntime", None)
    said = (tmp_path / "scores" / "early_exit.md").read_text(encoding="utf-8")
    assert "ONNX graphs in onnxruntime on cpu." in said
    for words in (("--dtype", "bfloat16"), ("--device", "cuda:0")):
        assert main([*command, str(tmp_path / "no"), *words]) == 2
        assert f"{words[1]}. Leave" in capsys.readouterr().err
    assert [entry["rule"] for entry in result["rules"]] == ["whole model", "early exit"]
    assert result["rules"][1]["saved"]["estimate"] > 0
    plain = dataclasses.replace(rule(0.6, model_sha256=sha256, n_layers=6), check="answers")
    write_rule(plain, tmp_path / "plain.safetensors")
    command = ["exits", "split", str(export), "--early-exit", str(tmp_path / "plain.safetensors")]
    assert main([*command, "-o", str(tmp_path / "no")]) == 2
    assert "Fit one with --check probe" in capsys.readouterr().err
    write_rule(rule(0.6, model_sha256="0" * 64, n_layers=6, facts=facts), file)
    command = ["exits", "split", str(export), "--early-exit", str(file), "-o", str(out)]
    assert main(command) == 2
    assert "was fitted to another model" in capsys.readouterr().err
