"""A recipe's cut is repaired and healed before it is exported, and every refusal comes early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.test_pipeline import Recorder, recipe

from shortstack import mend, pipeline, steps
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.manifest import read_manifest
from shortstack.prune import PrunePlan
from shortstack.run_folder import RunFolder
from shortstack.text import open_corpus

HEAL = {"tokens": 4096, "window_tokens": 64, "batch_windows": 8, "learning_rate": 1e-3}
ONE = {"export": [{"to": "gguf:F16"}]}


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("mended") / "out"
    wanted = recipe(tiny, repair={"windows": 8, "window_tokens": 64}, heal=HEAL, **ONE)
    return out, pipeline.run(wanted, out, Recorder())


def facts(out: Path, name: str) -> dict[str, Any]:
    manifest = read_manifest(out / "pruned" / name)
    assert manifest is not None
    return manifest


def test_what_is_exported_is_the_healed_cut(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    assert not result["failures"]
    healed = Checkpoint.open(out / "pruned" / "healed")
    assert facts(out, "gguf-f16")["artifact"]["source_sha256"] == healed.sha256
    found = facts(out, "healed")["heal"]
    assert found["perplexity_after"] < found["perplexity_before"]
    assert "repair" in facts(out, "repaired")


def test_healing_lowers_the_perplexity_that_is_reported(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    bare = pipeline.run(recipe(tiny, **ONE), tmp_path / "bare", Recorder())
    assert done[1]["perplexity"]["pruned"] < bare["perplexity"]["pruned"]
    assert done[1]["perplexity"]["original"] == bare["perplexity"]["original"]


def test_a_second_run_keeps_what_was_healed(done: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    out, _ = done
    display = Recorder()
    before = facts(out, "healed")
    wanted = recipe(tiny, repair={"windows": 8, "window_tokens": 64}, heal=HEAL, **ONE)
    pipeline.run(wanted, out, display)
    assert facts(out, "healed") == before
    assert "Heal the cut: unchanged, kept" in display.notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"repair": {"method": "glue"}}, "unknown repair 'glue'"),
        ({"heal": {**HEAL, "train": "hands"}}, "unknown choice of what to train 'hands'"),
        ({"heal": {**HEAL, "options": {"rat": 1}}}, "unknown option of training 'rat'"),
        ({"heal": {**HEAL, "options": {"train": "all"}}}, "train is among the options of training"),
        ({"heal": {**HEAL, "window_tokens": 10**6}}, "training text holds no 1000000 tokens"),
        ({"heal": {**HEAL, "general": "none.txt"}}, "cannot read the text file none.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_cut(
    tiny: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ShortstackError, match=said):
        pipeline.run(recipe(tiny, **ONE, **change), tmp_path / "out", Recorder())
    assert not (tmp_path / "out" / "pruned").exists()


def test_general_text_that_holds_test_text_is_a_leak(tiny: Path, tmp_path: Path) -> None:
    corpus = open_corpus("spdx")
    files = {}
    for part in ("calibration", "selection", "test"):
        files[part] = str(tmp_path / f"{part}.txt")
        Path(files[part]).write_text("\n\n".join(corpus.part(part)[:12]), encoding="utf-8")
    # what is test text there is training text here
    wanted = recipe(tiny, **ONE, text=files, heal={**HEAL, "general": files["test"]})
    with pytest.raises(ShortstackError, match="general text share .* a leak"):
        pipeline.run(wanted, tmp_path / "out", Recorder())


def test_other_words_in_the_general_text_heal_again(tiny: Path, tmp_path: Path) -> None:
    original, corpus, display = Checkpoint.open(tiny), open_corpus("spdx"), Recorder()
    file = tmp_path / "general.txt"
    wanted = recipe(tiny, **ONE, heal={**HEAL, "tokens": 512, "general": str(file)})
    plan = PrunePlan(original.n_layers, (2, 3), "explicit")
    with RunFolder.claim(tmp_path / "out", {}, display) as folder:
        cut = steps.cut(folder, original, plan)
        for word in ("work", "work", "copy"):
            documents = [f"Document {at}: " + f"{word} of the licence " * 30 for at in range(30)]
            file.write_text("\n\n".join(documents), encoding="utf-8")
            mend.mended(folder, wanted, original, cut, plan, corpus)
    assert display.steps.count("Heal the cut") == 2
    assert display.notes.count("Heal the cut: unchanged, kept") == 1
