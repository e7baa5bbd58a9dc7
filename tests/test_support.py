"""docs/support.md is true: every cell that says yes is measured, every other one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.agreement import TOKENS, distance, run
from tests.support import CUTS, IN_WINDOW, PAGE, TARGETS, YES, Cell, foretold, make_cell, page
from tests.zoo import NAMES, WINDOW, make_model
from transformers import AutoModelForCausalLM

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.runtimes import runtimes_for

TOLERANCE = {"gguf": 2e-3, "onnx": 1e-4}
"""Of the largest logit. llama.cpp rounds keys and values to float16 in its cache."""


@pytest.fixture(scope="module", params=NAMES)
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return Checkpoint.open(
        make_model(request.param, tmp_path_factory.mktemp("zoo") / request.param)
    )


@pytest.fixture(scope="module", params=CUTS)
def cell(
    request: pytest.FixtureRequest,
    original: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Cell:
    folder = tmp_path_factory.mktemp("cell") / "pruned"
    return make_cell(original.path.name, request.param, original, folder)


def skipped_in_memory(cell: Cell) -> NDArray[np.float32]:
    """The original, with what the plan drops passed over: no surgery, no renumbering, no config."""
    model = AutoModelForCausalLM.from_pretrained(cell.original.path, dtype=torch.float32).eval()
    inner = getattr(model.model, "language_model", model.model)
    for index in cell.plan.drop:
        inner.layers[index].register_forward_hook(lambda _, given, __: given[0])
    for index in cell.plan.attention:
        inner.layers[index].self_attn.register_forward_hook(
            lambda _, __, made: (torch.zeros_like(made[0]), *made[1:])
        )
    for index in cell.plan.mlp:
        inner.layers[index].mlp.register_forward_hook(lambda _, __, made: torch.zeros_like(made))
    with torch.inference_mode():
        logits: NDArray[np.float32] = (
            model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
        )
    return logits


pytestmark = pytest.mark.usefixtures("no_children")


def test_transformers_opens_the_pruned_folder_and_skips_what_was_dropped(cell: Cell) -> None:
    assert distance(run(cell.pruned.path, "pytorch", len(TOKENS)), skipped_in_memory(cell)) < 1e-5


@pytest.mark.parametrize("target", TARGETS.values())
def test_the_export_is_right_or_refused(target: str, cell: Cell, tmp_path: Path) -> None:
    spec = ExportSpec.parse(target)
    answer = foretold(cell.pruned, target)
    if answer not in (YES, IN_WINDOW):
        with pytest.raises(ShortstackError) as refusal:
            exporter(spec.format).export(cell.pruned, spec, tmp_path)
        assert str(refusal.value) == answer
        assert list(tmp_path.iterdir()) == []
        return
    n_tokens = WINDOW if answer == IN_WINDOW else len(TOKENS)
    artifact = exporter(spec.format).export(cell.pruned, spec, tmp_path)
    found = run(artifact.path, runtimes_for(spec.format)[0], n_tokens)
    truth = run(cell.pruned.path, "pytorch", len(TOKENS))[:n_tokens]
    assert distance(found, truth) <= TOLERANCE[spec.format]


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-window", "gemma2", "gemma3", "olmo3"])
def test_the_prompt_is_long_enough_to_tell_a_missing_window(name: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path / name)
    truth = run(folder, "pytorch", len(TOKENS))
    config = json.loads((folder / "config.json").read_text())
    config.update(sliding_window=len(TOKENS))
    (folder / "config.json").write_text(json.dumps(config))
    assert distance(run(folder, "pytorch", len(TOKENS)), truth) > 10 * max(TOLERANCE.values())


def test_the_page_says_what_the_exporters_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/support.md is old: run make support"
