"""Quantizing to a perplexity instead of a number of bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shortstack.checkpoint import Checkpoint
from shortstack.commands.quantize import quantize_model
from shortstack.errors import SettingError, ShortstackError
from shortstack.progress import Quiet
from shortstack.prune.quantize import QuantizeSettings
from shortstack.prune.quantize.target import TRIES, Try, best_of, fewest_bits
from shortstack.row_codes import RowCodesReader


@pytest.mark.parametrize("wanted", [1.005, 1.02, 1.08, 1.5])
@pytest.mark.parametrize("slope", [3.0, 4.0, 6.0])
def test_the_search_finds_the_fewest_bits(wanted: float, slope: float) -> None:
    asked: list[float] = []

    def ratio_at(bits: float) -> float:
        asked.append(bits)
        return math.exp(0.05 * slope ** (4.5 - bits))

    exact = 4.5 - math.log(math.log(wanted) / 0.05, slope)
    tried = fewest_bits(wanted, ratio_at)
    best = best_of(tried, wanted)
    assert [one.bits for one in tried] == asked
    assert len(asked) <= TRIES
    assert best is not None
    assert exact <= best.bits < exact + 0.25


def test_a_ratio_out_of_reach_is_not_met() -> None:
    tried = fewest_bits(1.01, lambda bits: 1.2)
    assert best_of(tried, 1.01) is None
    assert all(one.ratio == 1.2 for one in tried)
    assert [one.bits for one in tried] == sorted({one.bits for one in tried})
    noise = fewest_bits(1.01, lambda bits: 0.999)
    best = best_of(noise, 1.01)
    assert best == Try(min(one.bits for one in noise), 0.999)


def test_the_command_keeps_the_best_folder_alone(tiny: Path, tmp_path: Path) -> None:
    licence = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(2 * licence, encoding="utf-8")
    text = str(tmp_path / "text.txt")
    settings = QuantizeSettings(method="plain")

    def run(ratio: float) -> dict[str, object]:
        return quantize_model(
            *(str(tiny), text, tmp_path / "out", settings),
            windows=8,
            window_tokens=32,
            display=Quiet(),
            max_perplexity_ratio=ratio,
        )

    facts = run(1.3)
    tried = facts["tried"]
    assert isinstance(tried, list)
    met = [one["bits"] for one in tried if one["ratio"] <= 1.3]
    assert facts["wanted_bits"] == min(met)
    assert not [item for item in (tmp_path / "out").iterdir() if item.is_dir()]
    assert set(RowCodesReader(tmp_path / "out").names) <= set(
        Checkpoint.open(tmp_path / "out").tensors
    )
    assert run(1.3) == facts, "kept, not made again"
    with pytest.raises(SettingError, match="must be above 1"):
        run(1.0)
    with pytest.raises(ShortstackError, match="Allow a higher ratio"):
        run(1 + 1e-12)
