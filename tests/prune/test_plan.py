from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.prune import PrunePlan, Removal, parse_drop, parse_removal
from shortstack.prune.plan import read_plan


def test_keep_is_what_is_not_dropped() -> None:
    assert PrunePlan(6, (1, 4), "explicit").keep == (0, 2, 3, 5)


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ((2, 1), "sorted and unique, got 2,1. Write: 1,2"),
        ((1, 1), "sorted and unique"),
        ((3, 6), "there is no layer 6: the model has layers 0 to 5"),
        ((-1,), "there is no layer -1"),
        ((0, 1, 2, 3, 4, 5), "dropping all 6 layers leaves no model"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(drop: tuple[int, ...], words: str) -> None:
    with pytest.raises(ShortstackError) as error:
        PrunePlan(6, drop, "explicit")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_scores_must_be_one_a_layer() -> None:
    with pytest.raises(ShortstackError, match="2 scores for 6 layers"):
        PrunePlan(6, (1,), "influence", (0.1, 0.2))


def test_json_gives_back_the_same_plan() -> None:
    plan = PrunePlan(3, (1,), "perplexity", (None, 0.25, None), {"unit": "nats per token"})
    assert PrunePlan.from_json(plan.to_json()) == plan


def changed(**fields: Any) -> str:
    data = {**json.loads(PrunePlan(6, (1,), "explicit").to_json()), **fields}
    return json.dumps({k: v for k, v in data.items() if v is not ...})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "schema None"),
        (changed(schema=1), "schema 1, this version reads 2"),
        (changed(droop=[2]), "unknown or missing field 'droop'"),
        (changed(method=...), "unknown or missing field 'method'"),
        (changed(drop="1"), "wrong type"),
        (changed(drop=[True]), "wrong type"),
        (changed(n_layers=6.0), "wrong type"),
        (changed(scores=["a"]), "wrong type"),
        (changed(drop=[7]), "there is no layer 7"),
        (changed(attention=[7]), "there is no layer 7"),
        (changed(merge={"2": {"9": 1.0}}), "there is no layer 9"),
        (changed(merge={"2": 3}), "wrong type"),
        (changed(replace={"two": "f"}), "wrong type"),
        (changed(replace={"02": "f"}), "wrong type"),
        (changed(merge={"2": {"3": True}}), "wrong type"),
        (changed(merge={"2": {}}), "layer 2 adds up nothing"),
        (changed(merge={"2": {"3": 0.0}}), "layer 2 adds up nothing"),
        (changed(merge={"2": {"3": 1e300}}), "has the weight 1e\\+300"),
        (changed(merge={"2": {"3": float("nan")}}), "not finite"),
        (changed(facts={"unit": [float("inf")]}), "not finite"),
        ("[" * 100_000, "not JSON"),
        (changed(mlp=[1]), "layer 1 is dropped and changed"),
        (changed(mlp=[2], attention=[2]), "Drop the whole layer: 2"),
        (changed(mlp=[2], replace={"2": "f"}), "changed in two ways"),
    ],
)
def test_a_foreign_plan_is_refused(text: str, words: str) -> None:
    with pytest.raises(ShortstackError, match=words):
        PrunePlan.from_json(text)


def test_a_plan_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(ShortstackError, match=r"plan\.json is no plan .*: No such file"):
        read_plan(file)
    file.write_text(changed(mlp=[2], replace={"2": "f"}))
    with pytest.raises(ShortstackError, match=r"plan\.json: layer 2 is changed in two ways"):
        read_plan(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ShortstackError, match="not UTF-8"):
        read_plan(file)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("7", (7,)),
        ("11-15,20", (11, 12, 13, 14, 15, 20)),
        (" 3 , 1 - 2 ", (1, 2, 3)),
        ("4-4", (4,)),
    ],
)
def test_layers_are_read_from_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_drop(text) == layers


def test_sub_blocks_are_read_beside_layers() -> None:
    assert parse_removal("11-12,3.attention,5-6.mlp") == Removal((11, 12), (3,), (5, 6))
    with pytest.raises(ShortstackError, match="only whole layers"):
        parse_drop("3.mlp")


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "1.5", "1,1", "1-3,2"])
def test_other_layer_texts_are_refused(text: str) -> None:
    with pytest.raises(ShortstackError, match="Write"):
        parse_drop(text)
