"""The trim loop: it drops what should go, and its result is what it had in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.zoo import make_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.trim.ahead import check_reachable
from shortstack.prune.trim.choose import choose, scan_score
from shortstack.prune.trim.loop import Trimmed, trim
from shortstack.prune.trim.model import TrimModel, Unit, parse_unit
from shortstack.prune.trim.result import check_trimmable, plan_of, write_kept
from shortstack.prune.trim.rows import Parts, Row, encode, example, split_scan
from shortstack.prune.trim.scan import Exam, Scan, Score, evaluate, macro_f1, scan
from shortstack.prune.trim.schedule import Schedule, droppable
from shortstack.prune.trim.settings import Settings, Target
from shortstack.prune.trim.state import StateFolder
from shortstack.prune.trim.tune import Tuner, answer_loss
from shortstack.questions import Question
from shortstack.tokens import Encoder

WORDS = ["licence", "work", "source", "copy", "notice"]
QUICK = Settings(drop_per_step=3, ratio=0.5, rate=1e-3, batch_rows=8, max_prompt_tokens=48)


def made_up(count: int, seed: int = 0) -> list[Question]:
    """A rule that is learnt at once: red means yes."""
    draw = random.Random(seed)
    questions = []
    for number in range(count):
        words, red = " ".join(draw.choices(WORDS, k=3)), draw.randrange(2)
        text = f"{words} {number} {'red' if red else 'blue'}"
        questions.append(Question(str(number), text, ("yes", "no"), 1 - red))
    return questions


def parts(tune: int = 48, scan_rows: int = 16, test: int = 16) -> Parts:
    rows = made_up(tune + scan_rows + test)
    return Parts(
        tuple(rows[:tune]), tuple(rows[tune : tune + scan_rows]), tuple(rows[tune + scan_rows :])
    )


def longer(count: int) -> list[Question]:
    """Choices of several ids, one the beginning of another, and their own prompts' lengths."""
    choices = ("a copy of the licence", "a copy", "the source")
    return [Question(str(i), "work " * (1 + i % 4) + str(i), choices, i % 3) for i in range(count)]


@pytest.fixture
def opened(tiny: Path) -> tuple[Any, Encoder]:
    return load(tiny, torch.float32), Encoder(Checkpoint.open(tiny))


def run(folder: Path, work: Path, settings: Settings = QUICK, **options: Any) -> Trimmed:
    target = options.pop("target", Target(keep=0.5))
    encoder = Encoder(Checkpoint.open(folder))
    rows = options.pop("parts", parts())
    return trim(load(folder, torch.float32), encoder, rows, settings, target, work, **options)


def log_likelihood(model: Any, row: Row) -> float:
    """The plain way: one row, the whole model, all logits."""
    ids = torch.tensor([[*row.prompt, *row.answer]])
    with torch.inference_mode():
        logs = model(ids).logits.float().log_softmax(-1)[0, :-1]
    start = len(row.prompt) - 1
    return math.fsum(logs[start + at, token].item() for at, token in enumerate(row.answer))


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "granite", "mistral-window"])
def test_a_scan_is_what_cut_checkpoints_score_one_by_one(name: str, tmp_path: Path) -> None:
    """The residual stays: a unit that is out adds nothing, in memory and in transformers."""
    folder = make_model(name, tmp_path / "model")
    original, rows = Checkpoint.open(folder), longer(7)
    encoder = Encoder(original)
    model = TrimModel(load(folder, torch.float32), "sub-block")
    gone = [Unit(1, "mlp"), Unit(3, "attention"), Unit(4, "attention"), Unit(4, "mlp")]
    model.take_out(gone)
    candidates = [Unit(1, "attention"), Unit(2, "attention"), Unit(5, "mlp")]
    exam = Exam(encoder, rows, 64, torch.device("cpu"))
    found = scan(model, exam, candidates)
    for number, (units, score) in enumerate(
        [(gone, found.whole), *(([*gone, unit], found.without[unit]) for unit in candidates)]
    ):
        out = tmp_path / f"cut{number}"
        out.mkdir()
        from shortstack.prune import apply_plan

        apply_plan(original, plan_of(original.n_layers, units, {}), out)
        cut = load(out, torch.float32)
        table = [[log_likelihood(cut, row) for row in encode(encoder, q, 64)] for q in rows]
        expected = exam.score(torch.tensor(table, dtype=torch.float64).flatten())
        assert score.nats == pytest.approx(expected.nats, rel=1e-3)
        assert score.accuracy == expected.accuracy
    assert len({round(score.nats, 4) for score in found.without.values()}) == len(candidates)


def test_an_exam_without_questions_is_refused(opened: tuple[Any, Encoder]) -> None:
    with pytest.raises(ShortstackError, match="no questions to score"):
        Exam(opened[1], (), 64, torch.device("cpu"))


def test_a_block_scan_skips_whole_layers(opened: tuple[Any, Encoder], tiny: Path) -> None:
    hf, encoder = opened
    model = TrimModel(hf, "block")
    exam = Exam(encoder, longer(6), 64, torch.device("cpu"))
    found = scan(model, exam, droppable(model, Settings(unit="block")))
    assert Unit(0, "block") not in found.without
    model.take_out([Unit(2, "block")])
    assert evaluate(model, exam).nats == pytest.approx(
        found.without[Unit(2, "block")].nats, rel=1e-4
    )
    plain = load(tiny, torch.float32)
    del plain.model.layers[2]
    plain.config.num_hidden_layers -= 1
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        assert torch.allclose(hf(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)


def test_what_is_out_costs_nothing(opened: tuple[Any, Encoder]) -> None:
    hf, _ = opened
    model = TrimModel(hf, "sub-block")
    model.take_out([Unit(2, "mlp"), Unit(3, "attention"), Unit(3, "mlp")])
    called = []
    for index, layer in enumerate(model.layers):
        for module in (layer.mlp.down_proj, layer.self_attn.o_proj, layer.input_layernorm):
            module.register_forward_hook(
                lambda *_, index=index, m=module: called.append((index, m))
            )
    hf(torch.arange(1, 9)[None])
    assert 3 not in {index for index, _ in called}
    assert model.layers[2].mlp.down_proj not in [module for _, module in called]
    assert len(called) == 3 * 4 + 2


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


def test_a_scan_halves_a_batch_that_memory_does_not_hold(opened: tuple[Any, Encoder]) -> None:
    hf, encoder = opened
    model = TrimModel(hf, "sub-block")
    exam = Exam(encoder, longer(9), 64, torch.device("cpu"))
    assert len(exam.batches) == 1
    n_rows = len(exam.batches[0].tokens)
    candidates = [Unit(1, "mlp"), Unit(4, "attention")]
    before = scan(model, exam, candidates)

    def full(module: Any, args: Any) -> None:
        if len(args[0]) > limit:
            raise torch.OutOfMemoryError("out of memory")

    hf.model.embed_tokens.register_forward_pre_hook(full)
    limit = n_rows - 1
    found = scan(model, exam, candidates)
    assert found.whole.nats == pytest.approx(before.whole.nats, rel=1e-5)
    assert found.norm == pytest.approx(before.norm, rel=1e-5)
    for unit in candidates:
        assert found.without[unit].nats == pytest.approx(before.without[unit].nats, rel=1e-5)
    limit = n_rows // 3
    with pytest.raises(ShortstackError, match="out of memory while scanning"):
        scan(model, exam, candidates)


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
from tests.prune.test_trim import QUICK, run
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


def test_bad_targets_and_settings_are_refused(opened: tuple[Any, Encoder]) -> None:
    model = TrimModel(opened[0], "sub-block")
    with pytest.raises(ShortstackError, match="cannot drop 12 of 12 units: 11 may go"):
        Schedule.make(model, QUICK, Target(keep=0.01))
    protected = dataclasses.replace(QUICK, protect_first=1, protect_last=1)
    with pytest.raises(ShortstackError, match="8 may go"):
        Schedule.make(model, protected, Target(keep=0.1))
    with pytest.raises(ShortstackError, match="needs one target"):
        Target()
    with pytest.raises(ShortstackError, match="full fine-tune"):
        Target(loss_points=1.0)
    with pytest.raises(ShortstackError, match="unknown score"):
        Settings(score="scna")


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma2"])
@pytest.mark.parametrize("unit", ["sub-block", "block"])
def test_what_cannot_be_met_is_told_from_the_headers(name: str, unit: str, tmp_path: Path) -> None:
    """To the byte where the loop says it of the loaded model."""
    folder = make_model(name, tmp_path / "model")
    checkpoint, settings = Checkpoint.open(folder), dataclasses.replace(QUICK, unit=unit)
    model = TrimModel(load(folder, torch.float32), unit)
    free = droppable(model, settings)
    stays = sum(4 * p.numel() for p in model.hf.parameters())
    stays -= sum(4 * p.numel() for u in free for p in model.parameters_of(u).values())
    Schedule.make(model, settings, Target(max_bytes=stays))
    check_reachable(checkpoint, settings, Target(max_bytes=stays))
    for target in (Target(max_bytes=stays - 1), Target(keep=0.01)):
        with pytest.raises(ShortstackError) as late:
            Schedule.make(model, settings, target)
        with pytest.raises(ShortstackError) as early:
            check_reachable(checkpoint, settings, target)
        assert str(early.value) == str(late.value)


def test_parts_are_disjoint_and_large_enough() -> None:
    rows = made_up(40)
    with pytest.raises(ShortstackError, match="tune and test rows share 1"):
        Parts(tuple(rows[:20]), tuple(rows[20:30]), (rows[3],))
    with pytest.raises(ShortstackError, match="there are 1 scan rows"):
        Parts(tuple(rows[:20]), (rows[30],))
    with pytest.raises(ShortstackError, match="9 tune rows; 8 different"):
        Parts((rows[0],) * 9, tuple(rows[20:30]))
    tune, scanned = split_scan([*rows, rows[0]], seed=3)
    assert len(scanned) in (8, 9)
    assert len(tune) + len(scanned) == 41
    Parts(tune, scanned)


def test_choosing_follows_the_paper() -> None:
    """Equation 3 falls with accuracy; ties go to the largest norm."""
    assert scan_score(0.9) < scan_score(0.8) < scan_score(0.0)
    units = [Unit(i, "mlp") for i in range(4)]

    def scored(accuracy: float, nats: float) -> Score:
        return Score(accuracy, nats, None, 10)

    found = Scan(
        scored(1.0, 0.0),
        dict(
            zip(
                units,
                (scored(0.9, 3.0), scored(0.9, 2.0), scored(0.5, 1.0), scored(0.9, 4.0)),
                strict=True,
            )
        ),
        dict(zip(units, (1.0, 7.0, 9.0, 2.0), strict=True)),
    )
    assert choose(found, units, 2, "both") == (units[1], units[3])
    assert choose(found, units, 1, "norm") == (units[2],)
    assert choose(found, units, 1, "scan") == (units[3],)
    assert choose(found, units, 1, "likelihood") == (units[2],)


def test_macro_f1() -> None:
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("a", "c")]
    assert macro_f1(pairs) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)


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


def test_targets_in_bytes_time_and_points(
    opened: tuple[Any, Encoder], tiny: Path, tmp_path: Path
) -> None:
    model = TrimModel(opened[0], "sub-block")
    whole = sum(p.numel() * 4 for p in model.hf.parameters())
    units = sum(p.numel() * 4 for u in model.all_units for p in model.parameters_of(u).values())
    limit = whole - units // 2
    for mode in ("progressive", "one-shot"):
        settings = dataclasses.replace(QUICK, mode=mode, drop_per_step=2)
        small = run(tiny, tmp_path / mode, settings, target=Target(max_bytes=limit))
        gone = [p for u in small.last.gone for p in model.parameters_of(u).values()]
        if mode == "progressive":  # no more than it takes
            last = parse_unit(small.curve[-2]["dropped"][-1])
            spared = sum(p.numel() * 4 for p in model.parameters_of(last).values())
            assert whole - sum(p.numel() * 4 for p in gone) + spared > limit
            assert len(small.kept) == 1
        assert whole - sum(p.numel() * 4 for p in gone) <= limit
    with pytest.raises(ShortstackError, match="not met when all goes"):
        Schedule.make(model, QUICK, Target(max_bytes=whole - units))
    costs = {unit: 3.0 if unit.kind == "mlp" else 1.0 for unit in model.all_units}
    timed = Schedule.make(model, QUICK, Target(max_latency_ratio=0.5), costs)
    assert (timed.budget, timed.n_expected) == (12.0, 6)
    assert timed.met([unit for unit in model.all_units if unit.kind == "attention"])
    assert not timed.met([unit for unit in model.all_units if unit.kind == "mlp"])
    assert all(cost > 0 for cost in Schedule.make(model, QUICK, timed.target).costs.values())
    target = Target(loss_points=5.0, full_accuracy=0.9)
    lax = dataclasses.replace(QUICK, snapshots=(0.75,), batch_rows=4)
    passed = run(tiny, tmp_path, lax, target=target, parts=parts(96))
    left = [row["left"] for row in passed.curve if row["accuracy"] >= 0.85]
    assert passed.last.n_left == min(left)
    assert passed.last.accuracy >= 0.85
    assert passed.curve[-1]["left"] == 1 or passed.curve[-1]["accuracy"] < 0.85
    assert len(passed.kept) <= 2
    assert len(list(tmp_path.glob("kept-*"))) == len(passed.kept)


def test_units_read_what_they_write() -> None:
    for unit in (Unit(3, "mlp"), Unit(0, "attention"), Unit(12, "block")):
        assert parse_unit(str(unit)) == unit
