"""Checks are long enough to see a sliding window, and then a wrong one does not pass."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.zoo import WINDOW, make_model

from shortstack import steps
from shortstack.artifact import ExportSpec
from shortstack.certify import certify, make_reference
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, VerificationError
from shortstack.export import exporter
from shortstack.recipe import CalibrationRecipe, ExportRecipe, VerifyRecipe
from shortstack.text import Corpus, open_corpus
from shortstack.verification import Bounds
from shortstack.windows import calibration_windows, fit_checks, unseen_windows

SHORT = VerifyRecipe(windows=8, window_tokens=16, decode_tokens=4)
F32 = ExportRecipe(to="gguf:F32")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("zoo")
    names = ("llama", "gemma3", "mistral-window")
    return {name: Checkpoint.open(make_model(name, folder / name)) for name in names}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return open_corpus("spdx")


def test_a_model_without_windows_keeps_its_checks(zoo: dict[str, Checkpoint]) -> None:
    assert steps.checks_for(zoo["llama"], F32, SHORT) == SHORT


def test_an_artifact_that_ends_at_the_window_keeps_its_checks(zoo: dict[str, Checkpoint]) -> None:
    """llama.cpp's llama has no windows: the file's context is the window."""
    assert steps.checks_for(zoo["mistral-window"], F32, SHORT) == SHORT


def test_the_prompt_goes_beyond_the_window_in_as_few_tokens(zoo: dict[str, Checkpoint]) -> None:
    checks = steps.checks_for(zoo["gemma3"], F32, SHORT)
    assert checks.window_tokens - checks.decode_tokens > WINDOW
    assert checks.windows == -(-8 * 16 // checks.window_tokens)


def test_a_context_a_little_above_the_window_is_used_whole(zoo: dict[str, Checkpoint]) -> None:
    checks = fit_checks(SHORT, zoo["gemma3"], WINDOW + 2)
    assert (checks.window_tokens, checks.decode_tokens) == (WINDOW + 2, 1)


def test_a_wrong_window_passes_short_prompts_and_fails_the_fitted_ones(
    zoo: dict[str, Checkpoint], corpus: Corpus, tmp_path: Path
) -> None:
    right = zoo["gemma3"]
    shutil.copytree(right.path, tmp_path / "wrong")
    fields = json.loads((right.path / "config.json").read_text())
    (tmp_path / "wrong/config.json").write_text(json.dumps({**fields, "sliding_window": 128}))
    spec = ExportSpec.parse("gguf:F32")
    out = tmp_path / "out"
    out.mkdir()
    wrong = exporter("gguf").export(Checkpoint.open(tmp_path / "wrong"), spec, out)
    artifact = replace(wrong, source_sha256=right.sha256)
    bounds = Bounds.of(spec, max_perplexity_ratio=None)
    for checks, passes in ((SHORT, True), (steps.checks_for(right, F32, SHORT), False)):
        windows = unseen_windows(right, corpus, checks)
        truth = make_reference(right, windows, tmp_path / f"{passes}.npy", threads=1)
        prefill = checks.window_tokens - checks.decode_tokens
        if passes:
            certify(artifact, windows, truth, bounds, threads=1, prefill_tokens=prefill)
        else:
            with pytest.raises(VerificationError, match="KL"):
                certify(artifact, windows, truth, bounds, threads=1, prefill_tokens=prefill)


def test_calibration_windows_fit_the_context(zoo: dict[str, Checkpoint], corpus: Corpus) -> None:
    windows = calibration_windows(zoo["llama"], corpus, CalibrationRecipe(windows=3))
    assert [len(window) for window in windows] == [128] * 3


def test_too_little_text_for_a_long_window_is_named(zoo: dict[str, Checkpoint]) -> None:
    little = Corpus("a.txt", "0", ("a",), ("b",), ("c",))
    with pytest.raises(ShortstackError, match="the text holds no 36 tokens"):
        unseen_windows(zoo["gemma3"], little, steps.checks_for(zoo["gemma3"], F32, SHORT))
