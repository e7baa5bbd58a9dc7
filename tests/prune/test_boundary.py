"""Cheap repairs where a cut ends, against their formulas; cuts that climb together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.zoo import make_model

from shortstack.checkpoint import Checkpoint
from shortstack.prune import boundary
from shortstack.prune.calibrate import LayerwiseModel
from shortstack.prune.climb import Cut, climb, whole


def states(windows: int = 4, length: int = 50, width: int = 6) -> torch.Tensor:
    return torch.randn(windows, length, width, generator=torch.Generator().manual_seed(1))


def test_the_bias_is_the_mean_gap_of_all_but_first_tokens() -> None:
    arriving = states()
    gap = torch.arange(6.0)
    wanted = arriving + gap
    wanted[:, 0] += 1000  # what attention parks on a first token
    mended = boundary.fitted(boundary.mean_bias, [arriving], [wanted])(arriving)
    assert torch.allclose(mended, arriving + gap, atol=1e-4)


def test_the_scale_is_the_ratio_of_mean_norms() -> None:
    arriving = states()
    mended = boundary.fitted(boundary.scale, [arriving[:2], arriving[2:]], [-3 * arriving])(
        arriving
    )
    assert torch.allclose(mended, 3 * arriving, atol=1e-5)


def test_the_linear_repair_finds_a_map_and_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "RIDGE", 0.0)
    arriving = states()
    turn = torch.linalg.qr(states(1, 6)[0])[0]
    wanted = arriving @ turn + 0.5
    mended = boundary.fitted(boundary.linear, [arriving], [wanted])(arriving)
    assert torch.allclose(mended, wanted, atol=1e-5)


def test_a_repair_is_judged_on_text_it_was_not_fitted_to() -> None:
    arriving, wanted = states(4, 8), states(4, 8) * 0 + torch.randn(4, 8, 6)
    fit = boundary.linear
    own = boundary.fitted(fit, [arriving], [wanted])(arriving)
    crossed = torch.cat(boundary.crossed(fit, arriving.split(1), wanted.split(1)))
    apart = boundary.fitted(fit, [arriving[1::2]], [wanted[1::2]])(arriving[::2])
    assert torch.equal(crossed[::2], apart)
    assert (own - wanted).norm() < (crossed - wanted).norm()


def test_a_single_window_mends_itself() -> None:
    arriving = states(1)
    (mended,) = boundary.crossed(boundary.mean_bias, [arriving], [arriving + 2])
    assert torch.allclose(mended, arriving + 2, atol=1e-5)


@torch.inference_mode()
def test_cuts_share_what_is_alike_below_and_are_mended_only_where_they_end(tmp_path: Path) -> None:
    model = LayerwiseModel(Checkpoint.open(make_model("granite", tmp_path)), "float32")
    tokens = (torch.arange(40)[None] * 37 + 11) % 512
    half: Cut = frozenset({(6, "mlp")})
    cuts = [whole(3, 4), whole(3, 4, 7), half]
    places: list[int] = []

    def note(place: int, given: list[torch.Tensor]) -> list[torch.Tensor]:
        places.append(place)
        return given

    plain, noted = (climb(model, [tokens], cuts, mend=mend) for mend in (None, note))
    assert sorted(places) == [5, 7, 8]
    assert all(torch.equal(a, b) for (a,), (b,) in zip(plain, noted, strict=True))
    # 3 shared, 2 of the third alone, 2 and 2 beside each other, the last of two of the three.
    assert model.evaluations == 2 * (3 + 2 + 2 * 2 + 2)
    hidden = model.embed(tokens)
    for index in (0, 1, 2, 5, 6):
        hidden = model.layer(index, hidden)
    assert torch.equal(hidden, plain[1][0])
