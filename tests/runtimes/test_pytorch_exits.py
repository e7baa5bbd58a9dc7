"""Depth chosen per request: numbers of every depth, caches that do not mix, budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.exits import make_exits

from shortstack.errors import ShortstackError
from shortstack.exits.cost import DepthCost, RequestCost, deepest_within
from shortstack.exits.folder import ExitFolder
from shortstack.prune.exits.cut import write_exit
from shortstack.runtimes import open_session
from shortstack.runtimes.pytorch_exits import ExitsSession

TOKENS = list(range(1, 33))


@pytest.fixture(scope="module")
def exits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ExitFolder:
    return make_exits(tiny, tmp_path_factory.mktemp("exits") / "exits")


def opened(path: Path) -> ExitsSession:
    session = open_session(path, "pytorch", threads=1, context_tokens=64)
    assert isinstance(session, ExitsSession)
    return session


def test_the_whole_depth_is_bit_for_bit_the_model(exits: ExitFolder, tiny: Path) -> None:
    with open_session(tiny, "pytorch", threads=1, context_tokens=64) as plain:
        wanted = [plain.prefill(TOKENS), plain.decode(5), plain.decode(6)]
    with opened(exits.path) as session:
        assert (session.depth, session.info["layers"]) == (6, 6)
        found = [session.prefill(TOKENS), session.decode(5), session.decode(6)]
        session.depth = 2
        session.prefill(TOKENS)
        session.depth = 6
        found += [session.prefill(TOKENS)]
    for mine, theirs in zip(found, [*wanted, wanted[0]], strict=True):
        assert np.array_equal(mine, theirs)


def test_each_request_runs_at_its_depth_as_the_exported_model(
    exits: ExitFolder, tmp_path: Path
) -> None:
    with opened(exits.path) as session:
        for depth in (4, 2):
            out = tmp_path / str(depth)
            out.mkdir()
            write_exit(exits.open_base(), exits, depth, out)
            session.depth = depth
            with open_session(out, "pytorch", threads=1, context_tokens=64) as plain:
                wanted = [plain.prefill(TOKENS), plain.decode(5), plain.decode(6)]
            found = [session.prefill(TOKENS), session.decode(5), session.decode(6)]
            np.testing.assert_allclose(found, wanted, atol=2e-5)
            assert session.info["layers"] == depth + 1


def test_a_depth_may_be_named_behind_the_folder(exits: ExitFolder) -> None:
    with opened(exits.path.with_name("exits@4")) as session:
        assert session.depth == 4
    with pytest.raises(ShortstackError, match="no depth 3. It has 2, 4, and 6, the whole model"):
        opened(exits.path.with_name("exits@3"))


def test_a_request_never_goes_on_at_another_depth(exits: ExitFolder) -> None:
    with opened(exits.path) as session:
        session.prefill(TOKENS)
        session.depth = 2
        with pytest.raises(ShortstackError, match="decode needs a prefill"):
            session.decode(5)


def test_a_batch_runs_at_one_depth(exits: ExitFolder) -> None:
    with open_session(
        exits.path.with_name("exits@2"), "pytorch", threads=1, context_tokens=64, batch=2
    ) as session:
        assert isinstance(session, ExitsSession)
        rows = np.array([TOKENS, TOKENS[::-1]])
        found = session.prefill_rows(rows)
        np.testing.assert_allclose(found[1], session.prefill(TOKENS[::-1]), atol=2e-5)


def test_graphs_and_quantized_weights_are_refused(exits: ExitFolder) -> None:
    with pytest.raises(ShortstackError, match="neither cuda_graph=on nor quantize"):
        open_session(
            exits.path,
            *("pytorch",),
            threads=1,
            context_tokens=64,
            options={"quantize": "bnb-nf4"},
        )


def test_a_budget_takes_the_deepest_exit_that_keeps_to_it(exits: ExitFolder) -> None:
    with opened(exits.path) as session:
        cost = RequestCost(16, DepthCost(0.010, 0.002), DepthCost(0.001, 0.001))
        session._costs[16] = cost
        # 3, 5 or 6 layers: 16, 20, 22 ms for the prompt, 4, 6, 7 ms for each further token
        assert session.choose(21.0, prompt_tokens=16) == 4
        assert session.choose(100.0, prompt_tokens=16) == session.depth == 6
        assert session.choose(25.0, prompt_tokens=16, new_tokens=3) == 2
        with pytest.raises(ShortstackError, match="the least is 16.0 ms at depth 2, for 16 . 1"):
            session.choose(15.0, prompt_tokens=16)
        assert session.depth == 2  # what was in force stays


def test_costs_are_measured_where_they_are_asked_for(exits: ExitFolder) -> None:
    with opened(exits.path) as session:
        session.depth = 4
        cost = session.cost(20)
        assert session.depth == 4
        assert cost.prompt_tokens == 20
        assert cost.seconds(3, 2) > 0
        assert cost.seconds(6, 2) >= cost.seconds(3, 2)
        assert session.choose(1e6, prompt_tokens=20) == 6


def test_the_line_through_two_depths() -> None:
    line = DepthCost.through((10, 0.03), (30, 0.07))
    assert line.at(20) == pytest.approx(0.05)
    assert DepthCost.through((10, 0.03), (30, 0.02)) == DepthCost(0.02, 0.0)
    free = RequestCost(1, DepthCost(0.0, 0.0), DepthCost(0.0, 0.0))
    assert deepest_within(0.0, {8: 9, 30: 30}, free, 5) == 30
