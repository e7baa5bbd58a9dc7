"""The scan of a trim scores what cut checkpoints score, and the choice follows the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trimming import log_likelihood, longer
from tests.zoo import make_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.trim.choose import choose, scan_score
from shortstack.prune.trim.model import TrimModel, Unit
from shortstack.prune.trim.result import plan_of
from shortstack.prune.trim.rows import encode
from shortstack.prune.trim.scan import Exam, Scan, Score, evaluate, macro_f1, scan
from shortstack.prune.trim.schedule import droppable
from shortstack.prune.trim.settings import Settings
from shortstack.tokens import Encoder


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
