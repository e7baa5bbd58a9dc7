"""Charts: round axes, true lengths, every layer drawn."""

from __future__ import annotations

import re

import pytest

from shortstack.devices.report.charts import Bar, Group, bar_chart, nice_ticks, number, tick
from shortstack.devices.report.layers import is_wide, layer_chart


@pytest.mark.parametrize(
    ("top", "ticks"),
    [
        (70, [0, 20, 40, 60, 80]),
        (1.2, [0, 0.5, 1, 1.5]),
        (100, [0, 25, 50, 75, 100]),
        (0.003, [0, 0.001, 0.002, 0.003]),
    ],
)
def test_ticks_are_round_and_reach_the_top(top: float, ticks: list[float]) -> None:
    assert nice_ticks(top) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (61, "61.0"),
        (144.8, "145"),
        (12.345, "12.3"),
        (0.012, "0.0120"),
        (0.00001234, "1.2e-05"),
        (999.6, "1\N{NARROW NO-BREAK SPACE}000"),
        (1536, "1\N{NARROW NO-BREAK SPACE}536"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_ticks_have_no_idle_zeros() -> None:
    assert [tick(v) for v in (0, 0.5, 20, 1500, 0.0001)] == [
        *("0", "0.5", "20", "1\N{NARROW NO-BREAK SPACE}500", "1e-04"),
    ]


def test_bars_are_as_long_as_their_values() -> None:
    bars = (Bar("a", ((10, "original"),), "10"), Bar("b", ((4, "pruned"), (1, "file")), "5"))
    image = bar_chart("T", "d", [Group("g", bars)], "u")
    boxes = re.findall(r'<rect class="bar \w+" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', image)
    widths = [float(width) for _, width in boxes]
    assert widths[0] == pytest.approx(2.5 * widths[1], rel=0.01)
    assert widths[1] == pytest.approx(4 * widths[2], rel=0.01)
    assert float(boxes[2][0]) == pytest.approx(float(boxes[1][0]) + widths[1], abs=0.2)


def test_an_interval_draws_a_whisker_and_a_mark_its_line() -> None:
    bar = Bar("a", ((10, "pruned"),), "10", low=9, high=11, mark=12)
    image = bar_chart("T", "d", [Group("g", (bar,))], "u")
    assert image.count('class="whisker"') == 3
    assert image.count('class="mark"') == 1


def test_hostile_words_are_escaped() -> None:
    evil = '"><script>'
    image = bar_chart(evil, evil, [Group(evil, (Bar(evil, ((1, "pruned"),), evil),))], evil)
    assert "<script" not in image


@pytest.mark.parametrize(
    "scores",
    [
        [0.5, 0.1, None, 0.3],
        [0.5, -0.1, 0.2, 0.3],
        [-0.5, -0.1, -0.2, -0.3],
        [10.0, 0.01, 0.2, 0.3],
        [0.0, 0.0, 0.0, 0.0],
        [None, None, None, None],
        [2.0, 2.0, 2.0, 2.0],
    ],
)
def test_every_layer_is_drawn_inside_the_chart(scores: list[float | None]) -> None:
    image = layer_chart("T", "d", scores, [1])
    boxes = re.findall(
        r'<rect class="layer (\w+)" x="[-\d.]+" y="([-\d.]+)" width="[\d.]+" height="([\d.]+)"',
        image,
    )
    assert len(boxes) == 4
    assert boxes[1][0] == "dropped"
    for _, top, height in boxes:
        assert 0 <= float(top) <= float(top) + float(height) <= 190


def test_only_widely_spread_positive_scores_go_on_a_logarithmic_axis() -> None:
    assert is_wide([10, 0.1])
    assert not is_wide([10, 1])
    assert not is_wide([10, -0.1])
    assert not is_wide([])
