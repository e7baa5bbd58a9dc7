"""Recipes: what is shipped parses, what is misspelt is refused with the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.recipe import load_recipe, parse_recipe, shipped_recipes


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "model": "model",
        "text": "text.txt",
        "prune": {"drop": 2},
        "export": [{"to": "gguf:Q8_0"}],
        **changes,
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.export or loaded.early_exit


def test_demo_is_shipped() -> None:
    assert "demo" in shipped_recipes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruen": {}}, "in the top level: unknown key 'pruen'. Did you mean 'prune'?"),
        ({"prune": {"drop": 2, "methud": "x"}}, "in prune: unknown key 'methud'. Did you mean"),
        ({"export": [{"to": "gguf:F16", "option": {}}]}, "Did you mean 'options'?"),
        ({"text": {"calibration": "a", "selection": "b", "tset": "c"}}, "Did you mean 'test'?"),
        ({"prune": {}}, "prune.drop is missing"),
        ({"export": []}, "export is empty. Name at least one target"),
        ({"bench": {"repeats": 0}}, "bench.repeats: Input should be greater than or equal to 2"),
        ({"verify": {"window_tokens": 64, "decode_tokens": 64}}, "leave nothing to prefill"),
        ({"export": [{"to": "gguf"}]}, "is not FORMAT:PRECISION"),
        ({"export": [{"to": "gguf:F16"}, {"to": "gguf:F16"}]}, "gguf-f16 is listed twice"),
    ],
)
def test_a_wrong_recipe_gives_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShortstackError) as caught:
        parse_recipe(recipe(**changes), "r.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ShortstackError, match=r"unknown recipe 'dmeo'. Did you mean 'demo'?"):
        load_recipe("dmeo")


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ShortstackError, match=r"bad.yaml is not YAML"):
        load_recipe(str(bad))
