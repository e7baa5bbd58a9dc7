"""The trim loop: it drops what should go, and its result is what it had in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trimming import QUICK, log_likelihood, longer, made_up, parts, run
from tests.zoo import make_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.trim.loop import Trimmed, trim
from shortstack.prune.trim.model import TrimModel, Unit
from shortstack.prune.trim.result import check_trimmable, plan_of, write_kept
from shortstack.prune.trim.rows import example
from shortstack.prune.trim.settings import Target
from shortstack.prune.trim.state import StateFolder
from shortstack.prune.trim.tune import Tuner, answer_loss
from shortstack.tokens import Encoder


def test_the_checkpoint_is_the_model_in_memory(tmp_path: Path) -> None:
    """Half the sub-blocks gone, everything else tuned: logits in plain transformers."""
    folder = make_model("llama-untied", tmp_path / "model")
    settings = dataclasses.replace(QUICK, ratio=1.0, snapshots=(0.75,))
    original, loaded = Checkpoint.open(folder), load(folder, torch.float32)
    work = tmp_path / "work"
    result = trim(loaded, Encoder(original), parts(), settings, Target(keep=0.5), work)
    assert [kept.n_left for kept in result.kept] == [12, 8]
    out = tmp_path / "out"
    out.mkdir()
    written = write_kept(original, result.last, work, {}, out)
    assert written.n_layers == len(plan_of(8, result.last.gone, {}).keep)
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        ours = loaded(ids, use_cache=False).logits
        assert torch.allclose(load(out, torch.float32)(ids).logits, ours, atol=1e-5)
        assert not torch.allclose(load(folder, torch.float32)(ids).logits, ours, atol=1e-2)
    with pytest.raises(ShortstackError, match="lost sub-blocks already"):
        check_trimmable(written)


def test_the_loop_learns_and_drops_what_is_idle(tiny: Path, tmp_path: Path) -> None:
    """Two sub-blocks are made to add nothing: they go first, and accuracy holds."""
    encoder, hf = Encoder(Checkpoint.open(tiny)), load(tiny, torch.float32)
    idle = {Unit(2, "attention"), Unit(3, "mlp")}
    with torch.no_grad():
        hf.model.layers[2].self_attn.o_proj.weight.zero_()
        hf.model.layers[3].mlp.down_proj.weight.zero_()
    settings = dataclasses.replace(
        QUICK, score="likelihood", drop_per_step=2, batch_rows=4, ratio=0.25
    )
    rows: list[dict[str, Any]] = []
    target = Target(keep=0.5)
    result = trim(hf, encoder, parts(96), settings, target, tmp_path, on_round=rows.append)
    assert not idle & set(result.trained)
    assert len(result.trained) == 3
    assert idle <= set(result.last.gone)
    assert result.last.n_left == 6
    assert Unit(0, "attention") not in result.last.gone
    assert [row["left"] for row in rows] == [12, 10, 8, 6]
    assert rows[-1]["accuracy"] >= 0.9
    assert result.tests[6]["test"].accuracy >= 0.9
    assert result.tests[6]["test"].n == 16


def test_frozen_parts_do_not_change(opened: tuple[Any, Encoder]) -> None:
    hf, encoder = opened
    model = TrimModel(hf, "sub-block")
    trained = [Unit(1, "mlp"), Unit(4, "attention")]
    tuner = Tuner(model, QUICK, trained)
    before = {name: tensor.clone() for name, tensor in hf.named_parameters()}
    tuner.round([example(encoder, q, 48, "answer") for q in made_up(16)], 0, lambda: None)
    changed = {
        name for name, tensor in hf.named_parameters() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for unit in trained for name in model.parameters_of(unit)}


def test_the_loss_is_of_the_answer_alone(opened: tuple[Any, Encoder]) -> None:
    hf, encoder = opened
    model = TrimModel(hf, "sub-block")
    batch = [example(encoder, question, 64, "answer") for question in longer(5)]
    rows = [row for one in batch for row in one.rows]
    assert len(rows) == 5
    expected = -sum(log_likelihood(hf, row) for row in rows) / sum(len(r.answer) for r in rows)
    assert answer_loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_out_of_memory_halves_the_batch_once(opened: tuple[Any, Encoder]) -> None:
    hf, encoder = opened
    rows = [example(encoder, q, 48, "answer") for q in made_up(8)]
    model = TrimModel(hf, "sub-block")
    tuner = Tuner(model, QUICK, model.all_units)
    sizes = []

    def full(module: Any, args: Any) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")

    hook = hf.model.embed_tokens.register_forward_pre_hook(full)
    tuner.round(rows, 0, lambda: None)
    assert sizes == [8, 4, 4]
    hook.remove()
    hf.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: (_ for _ in ()).throw(torch.OutOfMemoryError("out"))
    )
    with pytest.raises(ShortstackError, match="out of memory with batches of 4 rows"):
        tuner.round(rows, 1, lambda: None)


def test_whole_blocks_go(tiny: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, unit="block", drop_per_step=2, protect_last=1)
    result = run(tiny, tmp_path / "work", settings, target=Target(keep=0.34))
    assert [row["left"] for row in result.curve] == [6, 4, 2]
    plan = plan_of(6, result.last.gone, {})
    assert plan.keep == (0, 5)
    assert not plan.attention
    out = tmp_path / "out"
    out.mkdir()
    assert write_kept(Checkpoint.open(tiny), result.last, tmp_path / "work", {}, out).n_layers == 2


CHILD = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.trimming import QUICK, run
torch.set_num_threads(1)
folder, work, at, first_scan = sys.argv[1:]
calls = 0
def count(module, *_):
    global calls
    calls += isinstance(module, torch.nn.Embedding)
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
torch.nn.modules.module.register_module_forward_pre_hook(count)
run(Path(folder), Path(work), replace(QUICK, first_scan=first_scan))
"""


@pytest.mark.parametrize(
    ("at", "round_number", "first_scan"), [(4, 0, "tuned"), (16, 1, "untuned")]
)
def test_a_killed_run_goes_on_to_the_same_result(
    tiny: Path, tmp_path: Path, at: int, round_number: int, first_scan: str
) -> None:
    """Killed inside a round, at the `at`-th batch that enters the model."""
    torch.set_num_threads(1)
    work = tmp_path / "killed"
    root = Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny), str(work), str(at), first_scan],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])},
    )
    assert died.returncode == -signal.SIGKILL
    assert json.loads((work / "state.json").read_text())["round"] == round_number
    rows: list[dict[str, Any]] = []
    settings = dataclasses.replace(QUICK, first_scan=first_scan)
    went_on = run(tiny, work, settings, on_round=rows.append)
    assert rows[0]["round"] == round_number
    whole = run(tiny, tmp_path / "whole", settings)
    assert _comparable(went_on) == _comparable(whole)
    first = load_file(work / went_on.last.file)
    second = load_file(tmp_path / "whole" / whole.last.file)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _comparable(result: Trimmed) -> tuple[Any, ...]:
    curve = [{k: v for k, v in row.items() if k != "seconds"} for row in result.curve]
    return curve, result.kept, result.tests, result.trained


def test_other_settings_start_afresh(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path)
    rows: list[dict[str, Any]] = []
    run(tiny, tmp_path, on_round=rows.append)
    assert rows == []
    run(tiny, tmp_path, dataclasses.replace(QUICK, seed=1), on_round=rows.append)
    assert [row["round"] for row in rows] == [0, 1, 2]


def test_a_loss_that_is_not_finite_stops(tiny: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, rate=1e30, ratio=1.0)
    with pytest.raises(ShortstackError, match=r"not finite at step \d+ of round 0.*12 of 12"):
        run(tiny, tmp_path, settings)
    state = json.loads((tmp_path / "state.json").read_text())
    kept = load_file(tmp_path / state["tensors"])
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert state["stopped"]
    gentle = run(tiny, tmp_path, dataclasses.replace(settings, rate=1e-3))
    assert gentle.last.n_left == 6


def test_a_stopped_run_goes_on_with_another_rate(tiny: Path, tmp_path: Path) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    for settings in (QUICK, dataclasses.replace(QUICK, seed=1)):
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path, settings, on_round=interrupt)
    rows: list[dict[str, Any]] = []
    StateFolder(tmp_path, "", "").stop()
    slower = dataclasses.replace(settings, rate=5e-4)
    run(tiny, tmp_path, slower, on_round=rows.append)
    assert [row["round"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("mode", "left"),
    [("one-shot", [12, 6, 6]), ("full", [12, 12, 12]), ("progressive", [12, 9, 6])],
)
def test_all_modes_spend_the_same(
    mode: str, left: Sequence[int], tiny: Path, tmp_path: Path
) -> None:
    result = run(tiny, tmp_path, dataclasses.replace(QUICK, mode=mode))
    assert [row["left"] for row in result.curve] == left
    assert result.curve[-1]["tokens"] == 3 * result.curve[0]["tokens"]
    assert result.last.n_left == left[-1]
    assert result.last.accuracy == max(r["accuracy"] for r in result.curve if r["left"] == left[-1])
