"""Exits at their limits: one that runs as many layers as the whole model, numbers beyond reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.exits import make_exits

from shortstack.errors import ShortstackError
from shortstack.exits.cost import DepthCost, RequestCost, deepest_within
from shortstack.exits.folder import FACTS, read_exits, split_depth


def test_an_exit_that_runs_all_layers_gives_way_to_the_whole_model() -> None:
    cost = DepthCost.through((6, 1.0), (6, 2.0))
    assert cost.at(6) == 2.0
    request = RequestCost(8, cost, DepthCost.through((6, 0.1), (6, 0.1)))
    assert deepest_within(1e4, {5: 6, 6: 6}, request, 2) == 6


def test_a_number_of_layers_that_is_infinite_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = make_exits(tiny, tmp_path / "exits").path / FACTS
    file.write_text(file.read_text().replace('"n_layers": 6', '"n_layers": 1e400'))
    with pytest.raises(ShortstackError, match="is damaged: OverflowError"):
        read_exits(file.parent)


@pytest.mark.parametrize("depth", ["9" * 300, "9" * 5000, "\u0663"])
def test_a_number_that_no_model_has_layers_of_names_no_exit(
    depth: str, tiny: Path, tmp_path: Path
) -> None:
    """Longer than a file's name may be, or than Python reads, or in other digits."""
    exits = make_exits(tiny, tmp_path / "exits").path
    path = Path(f"{exits}@{depth}")
    assert split_depth(path) == (path, None)
