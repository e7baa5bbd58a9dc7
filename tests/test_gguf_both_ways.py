"""Cut a GGUF file, or export a cut checkpoint: two independent ways to one file."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from tests.support import period_of, plan_of
from tests.zoo import NAMES, make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.prune import apply_plan
from shortstack.prune.gguf_cut import cut_gguf, plan_cut

CUTS = ("scattered", "one period")


def write(checkpoint: Checkpoint, precision: str, out: Path) -> Path:
    out.mkdir()
    return exporter("gguf").export(checkpoint, ExportSpec.parse(f"gguf:{precision}"), out).path


def refused(checkpoint: Checkpoint) -> bool:
    try:
        exporter("gguf").check(checkpoint, ExportSpec.parse("gguf:F32"))
    except ShortstackError:
        return True
    return False


def keys(reader: gguf.GGUFReader) -> dict[str, object]:
    """All key-values but the header's own and the name, which is the folder's."""
    found = {name: field.contents() for name, field in reader.fields.items()}
    others = ("GGUF.", "general.name")
    return {name: value for name, value in found.items() if not name.startswith(others)}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model", NAMES)
def test_cutting_the_file_is_exporting_the_cut(model: str, cut: str, tmp_path: Path) -> None:
    original = Checkpoint.open(make_model(model, tmp_path / model))
    assert original.n_layers % period_of(original) == 0
    plan = plan_of(original, cut)
    whole = write(original, "F32", tmp_path / "whole")
    (tmp_path / "pruned").mkdir()
    pruned = apply_plan(original, plan, tmp_path / "pruned")
    target = tmp_path / "cut.gguf"
    if refused(pruned):  # what llama.cpp cannot express, neither way can
        with pytest.raises(ShortstackError, match="Nearest safe cuts"):
            cut_gguf(plan_cut(whole, plan.drop), target)
        return
    cut_gguf(plan_cut(whole, plan.drop), target)
    right = write(pruned, "F32", tmp_path / "right")
    made, expected = gguf.GGUFReader(target), gguf.GGUFReader(right)
    theirs = {tensor.name: tensor for tensor in expected.tensors}
    assert {tensor.name for tensor in made.tensors} == set(theirs)
    for tensor in made.tensors:
        assert tensor.data.tobytes() == theirs[tensor.name].data.tobytes(), tensor.name
    found, meant = keys(made), keys(expected)
    if (model, cut) == ("qwen3-window", "one period"):
        # llama.cpp has no window there, so that the whole file's context ends at it; the file does
        # not say that it was for the layers that are gone
        found["qwen3.context_length"] = meant["qwen3.context_length"]
    assert found == meant
