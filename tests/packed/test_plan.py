"""The planner's arithmetic, and its file."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.packed.plan import Option, curve, hull, quickest_within, smallest_within
from shortstack.packed.plan_file import CurvePoint, PlanFile, read_plan


def drawn(seed: int, n: int) -> dict[str, list[Option]]:
    rng = random.Random(seed)
    return {
        f"m{i}": [
            Option(form, rng.randint(1, 100), rng.uniform(1, 10)) for form in ("a", "b", "c", "d")
        ]
        for i in range(n)
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_beats_the_curve(seed: int) -> None:
    """Every plan of the curve is the best of all 256 for its own bytes."""
    options = drawn(seed, 4)
    points = curve(options)
    every = [
        (sum(o.n_bytes for o in chosen), sum(o.seconds for o in chosen))
        for chosen in itertools.product(*options.values())
    ]
    for point in points:
        best = min(seconds for n_bytes, seconds in every if n_bytes <= point.n_bytes)
        assert point.seconds == pytest.approx(best)
    assert points[-1].n_bytes == min(n_bytes for n_bytes, _ in every)
    assert points[0].seconds == pytest.approx(min(seconds for _, seconds in every))


def test_a_form_beaten_in_both_is_never_wanted() -> None:
    forms = [Option("good", 10, 1.0), Option("bad", 20, 2.0)]
    assert [one.form for one in hull(forms)] == ["good"]


def test_budgets_find_the_best_that_fits_or_nothing() -> None:
    points = curve({"m": [Option("fast", 100, 1.0), Option("small", 50, 3.0)]})
    found = smallest_within(points, 2.0)
    assert found is not None
    assert found.forms == {"m": "fast"}
    found = quickest_within(points, 60)
    assert found is not None
    assert found.forms == {"m": "small"}
    assert smallest_within(points, 0.5) is None
    assert quickest_within(points, 40) is None


def a_plan() -> PlanFile:
    point = CurvePoint(n_bytes=1, predicted_s=1.0, share_of_int8=1.0, slowdown=1.0, forms={})
    return PlanFile(
        model_sha256="0" * 64,
        device="cpu",
        threads=1,
        workers=0,
        dtype="bfloat16",
        int8_bytes=1,
        int8_s=1.0,
        chosen=point,
        curve=[point],
        forms={"m": "int8"},
    )


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(a_plan().model_dump_json())
    assert read_plan(file) == a_plan()
    assert read_plan(file).forms_for("0" * 64, ["m"]) == {"m": "int8"}


def test_a_plan_of_another_model_is_refused() -> None:
    for sha256, names in (("1" * 64, ["m"]), ("0" * 64, ["m", "n"])):
        with pytest.raises(ShortstackError, match="the plan is of the packed model 000000000000"):
            a_plan().forms_for(sha256, names)


def test_times_without_an_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(a_plan().model_dump_json().replace('"int8_s":1.0', '"int8_s":1e999'))
    with pytest.raises(ShortstackError, match="is no plan of a packed model: int8_s"):
        read_plan(file)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 2}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ShortstackError, match="is no plan of a packed model"):
        read_plan(file)
    with pytest.raises(ShortstackError, match="cannot be read"):
        read_plan(tmp_path / "none.json")
