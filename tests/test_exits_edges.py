"""Exits at their limits: one that runs as many layers as the whole model, numbers beyond reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.exits import make_exits

from shortstack.cli import main
from shortstack.commands.heal import training_folder
from shortstack.errors import ShortstackError
from shortstack.exits.cost import DepthCost, RequestCost, deepest_within
from shortstack.exits.folder import FACTS, read_exits
from shortstack.exits.named import split_depth
from shortstack.intake import resolve
from shortstack.runtimes import open_session
from shortstack.runtimes.pytorch_exits import ExitsSession


def test_an_exit_that_runs_all_layers_gives_way_to_the_whole_model() -> None:
    cost = DepthCost.through((6, 1.0), (6, 2.0))
    assert cost.at(6) == 2.0
    request = RequestCost(8, cost, DepthCost.through((6, 0.1), (6, 0.1)))
    assert deepest_within(1e4, {5: 6, 6: 6}, request, 2) == 6


def test_a_number_of_layers_that_is_infinite_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = make_exits(tiny, tmp_path / "exits").path / FACTS
    file.write_text(file.read_text().replace('"n_layers": 6', '"n_layers": 1e400'))
    with pytest.raises(ShortstackError, match="n_layers must be whole numbers"):
        read_exits(file.parent)


@pytest.mark.parametrize("depth", ["9" * 300, "9" * 5000, "\u0663"])
def test_a_number_that_no_model_has_layers_of_names_no_exit(
    depth: str, tiny: Path, tmp_path: Path
) -> None:
    """Longer than a file's name may be, or than Python reads, or in other digits."""
    exits = make_exits(tiny, tmp_path / "exits").path
    path = Path(f"{exits}@{depth}")
    assert split_depth(path) == (path, None)


def test_a_folder_named_as_an_exit_does_not_hide_it(tiny: Path, tmp_path: Path) -> None:
    make_exits(tiny, tmp_path / "exits")
    (tmp_path / "exits@2").mkdir()
    (tmp_path / "exits@3").mkdir()
    with pytest.raises(ShortstackError, match="also a name of depth 2 of the exits in"):
        resolve(str(tmp_path / "exits@2"))
    assert resolve(str(tmp_path / "exits@3"))[0] == "folder"  # there is no such exit to hide


def test_an_exit_may_be_exported_to_its_own_name(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = make_exits(tiny, tmp_path / "exits").path
    named = f"{exits}@2"
    assert main(["exits", "export", str(exits), "--exit", "2", "-o", named, "--json"]) == 0
    assert resolve(named) == ("folder", named)


def test_training_an_exit_says_how_it_becomes_a_folder(tiny: Path, tmp_path: Path) -> None:
    exits = make_exits(tiny, tmp_path / "exits").path
    with pytest.raises(ShortstackError, match=f"shortstack exits export {exits} --exit 2 -o"):
        training_folder(f"{exits}@2")


def test_a_request_beyond_the_context_is_refused_before_anything_is_measured(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = make_exits(tiny, tmp_path / "exits").path
    with open_session(exits, "pytorch", threads=1, context_tokens=32) as session:
        assert isinstance(session, ExitsSession)
        said = "a prompt of 24 and 9 new tokens are 33, the session's context is 32 tokens"
        with pytest.raises(ShortstackError, match=said):
            session.choose(1e6, prompt_tokens=24, new_tokens=9)
        assert session.choose(1e6, prompt_tokens=24, new_tokens=8) == 6
        for none in ({"prompt_tokens": 0}, {"prompt_tokens": 4, "new_tokens": -100}):
            with pytest.raises(ShortstackError, match="a prompt and at least one new token"):
                session.choose(1e6, **none)
    words = ("--max-latency-ms", "1e6", "--prompt-tokens", "128", "--new-tokens", "100000")
    assert main(["exits", "choose", str(exits), *words]) == 2
    told = capsys.readouterr().err
    assert "a prompt of 128 and 100000 new tokens are 100128, the model's context is" in told


@pytest.mark.parametrize("step", ["extend", "extend_rows", "decode"])
def test_no_step_goes_on_behind_a_change_of_depth(tiny: Path, tmp_path: Path, step: str) -> None:
    exits = make_exits(tiny, tmp_path / "exits").path
    given = {"extend": [1, 2], "extend_rows": np.array([[1, 2]]), "decode": 1}[step]
    with open_session(exits, "pytorch", threads=1, context_tokens=32) as session:
        assert isinstance(session, ExitsSession)
        session.prefill([1, 2, 3])
        session.depth = 2
        with pytest.raises(ShortstackError, match="needs a prefill before it"):
            getattr(session, step)(given)


@pytest.mark.parametrize("budget", [float("nan"), float("inf")])
def test_a_budget_that_is_no_number_is_refused(budget: float) -> None:
    """Of `nan` no depth is told apart, and JSON has no infinity."""
    cost = DepthCost(0.0, 0.1)
    with pytest.raises(ShortstackError, match="is no budget. Give a number"):
        deepest_within(budget, {5: 6, 6: 6}, RequestCost(8, cost, cost), 2)


def test_exits_whose_folder_was_moved_name_both_places(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "models" / "tiny"
    shutil.copytree(tiny, base)
    made = make_exits(base, tmp_path / "run" / "exits")
    (tmp_path / "away").mkdir()
    moved = tmp_path / "away" / "run" / "exits"
    shutil.move(tmp_path / "run", moved.parent)
    sought = tmp_path / "away" / "models" / "tiny"
    assert main(["bench", f"{moved}@2", "-o", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{moved} belongs to a model that lay at ../../models/tiny from there" in said
    assert f"at {sought} there is none" in said
    assert made.base_sha256[:12] in said
    assert "--model of exits choose or exits export" in said
    assert read_exits(moved, base).open_base().path == base  # what it says to do
    sought.parent.mkdir()
    sought.symlink_to(base)
    assert read_exits(moved).open_base().sha256 == made.base_sha256


def test_exits_reached_by_a_link_find_their_base(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "models" / "tiny"
    shutil.copytree(tiny, base)
    made = make_exits(base, tmp_path / "run" / "exits")
    link = tmp_path / "a" / "b" / "c" / "exits"
    link.parent.mkdir(parents=True)
    link.symlink_to(made.path)
    assert read_exits(link).open_base().path == base
