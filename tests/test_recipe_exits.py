"""Recipes that make depth a choice: exits trained, exported and measured; an early exit fitted."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.test_pipeline import Recorder, leftovers
from tests.test_trim_command import write
from tests.trimming import made_up

from shortstack import exit_steps, pipeline
from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.devices.report import ReportData, write_report
from shortstack.errors import ShortstackError
from shortstack.exits.folder import TENSORS, read_exits
from shortstack.forecast import forecast
from shortstack.manifest import read_manifest
from shortstack.recipe import Recipe, parse_recipe
from shortstack.runtimes import open_session

EXITS = {
    **{"at": [4, 2], "tokens": 1024, "window_tokens": 64, "batch_windows": 8},
    **{"export": [2], "bench": False, "options": {"device": "cpu"}},
}


def data(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "text": "spdx",
        "exits": EXITS,
        "export": [{"to": "gguf:F16"}],
        "verify": {"windows": 4, "window_tokens": 64, "decode_tokens": 16},
        "bench": {"prompt_tokens": 16, "decode_tokens": 8, "repeats": 2, "threads": 1},
        **changes,
    }


def recipe(model: Path, **changes: Any) -> Recipe:
    return parse_recipe(data(model, **changes), "test.yaml")


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, pipeline.run(recipe(tiny), out, Recorder())


def test_exits_are_trained_and_become_proven_files(
    done: tuple[Path, dict[str, Any]], tiny: Path
) -> None:
    out, result = done
    assert result["failures"] == []
    assert leftovers(out) == []
    exits = read_exits(out / "exits")
    assert (exits.exits, exits.facts["steps"]) == ((2, 4), 2)
    assert exits.facts["losses"]["2"]["after"]["kl"] < exits.facts["losses"]["2"]["before"]["kl"]
    model = Checkpoint.open(out / "exit-2" / "checkpoint")
    assert model.n_layers == 3
    made = read_manifest(out / "exit-2" / "gguf-f16")
    assert made is not None
    assert made["artifact"]["source_sha256"] == model.sha256
    assert made["verification"]["kl_decode"] < 1e-4
    assert not (out / "exit-4").exists()
    original = read_manifest(out / "original" / "gguf-f16")
    assert original is not None
    assert original["artifact"]["source_sha256"] == Checkpoint.open(tiny).sha256


def test_the_report_has_the_exits(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    found = {e["label"]: e for e in report(out)["entries"]}
    assert found.keys() == {"original", "exit-2"}
    assert found["exit-2"]["measurement"]["artifact"]["n_layers"] == 3
    assert [c["label"] for c in result["comparisons"]] == ["exit-2"]
    rows = result["exits"]["depths"]
    assert [(row["depth"], row["layers"]) for row in rows] == [(2, 3), (4, 5), (6, 6)]
    unseen = [
        None if label is None else found[label]["verification"]["reference_perplexity"]
        for label in ("exit-2", None, "original")
    ]
    assert [row["unseen_perplexity"] for row in rows] == unseen
    said = (out / "report.md").read_text()
    ratio = rows[0]["unseen_perplexity"] / rows[2]["unseen_perplexity"]
    assert f"{ratio:.2f} times at 3" in said.splitlines()[0]
    assert "| exit at 4 | 5 | – | – |" in said
    assert "GGUF F16, exit-2" in said
    assert '<span class="swatch pruned"></span>exit</li>' in (out / "report.html").read_text()


def test_every_depth_is_measured_in_pytorch_as_one_set_of_weights(
    done: tuple[Path, dict[str, Any]], tiny: Path
) -> None:
    exits = read_exits(done[0] / "exits", tiny)
    measured = {**EXITS, "bench": True}
    found = {e.label: e for e in exit_steps.depths(recipe(tiny, exits=measured), exits)}
    files = (tiny / "model.safetensors", exits.path / TENSORS)
    whole = sum(file.stat().st_size for file in files)
    for label, layers in (("exit-2", 3), ("exit-4", 5), ("original", 6)):
        artifact = found[label].artifact
        assert artifact is not None
        assert artifact.n_layers == layers
        assert artifact.size_bytes == pytest.approx(whole, rel=0.05)
        with open_session(artifact.path, "pytorch", threads=1, context_tokens=8) as session:
            assert session.info["layers"] == layers
    read = [found[name].artifact.weight_bytes_per_token for name in ("exit-2", "exit-4")]  # type: ignore[union-attr]  # just asserted
    assert read[0] < read[1]
    assert exit_steps.depths(recipe(tiny), exits) == []


def report(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())


def test_a_report_of_exits_is_written_again_from_its_data(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    write_report(ReportData.from_dict(report(done[0])), tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_text() == (done[0] / name).read_text()


def test_a_second_run_keeps_every_step(done: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    display = Recorder()
    pipeline.run(recipe(tiny), done[0], display)
    assert display.steps == ["Open the model"]


def test_a_dry_run_says_what_exits_take(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    told = forecast(recipe(tiny))
    assert told["n_layers"] == {"original": 6, "exit-2": 3}
    rows = {row["step"]: row for row in told["steps"]}
    for name in ("exits", "exit-2/checkpoint", "exit-2/gguf-f16"):
        size = sum(f.stat().st_size for f in (done[0] / name).iterdir())
        assert rows[name]["size_bytes"] == pytest.approx(size, rel=0.25), name
    file = tmp_path / "exits.yaml"
    file.write_text(json.dumps(data(tiny)))
    assert main(["run", str(file), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def test_exits_go_beside_a_cut(tiny: Path) -> None:
    both = recipe(tiny, prune={"method": "last", "drop": 2}, quantize={"bits": 5})
    models = forecast(both)["n_layers"]
    assert models == {"original": 6, "pruned": 4, "exit-2": 3}


def test_a_killed_training_goes_on_from_its_last_state(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    saving = {**EXITS, "options": {"device": "cpu", "save_steps": 1}}
    wanted = recipe(tiny, exits=saving)

    class Killing(Recorder):
        def note(self, text: str) -> None:
            super().note(text)
            if (out / ".exits.training").is_dir() and text.startswith("step"):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(wanted, out, Killing())
    assert not (out / "exits").exists()
    display = Recorder(interrupt_in="Write exit 2")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(wanted, out, display)
    assert [note for note in display.notes if "going on" in note]
    assert not (out / ".exits.training").exists()
    whole, again = (read_exits(folder / "exits") for folder in (done[0], out))
    assert again.sha256 == whole.sha256


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, Any]:
    sizes = {"tune": 48, "validation": 24, "test": 24}
    files = {
        name: write(tmp_path / f"{name}.jsonl", made_up(count, seed))
        for seed, (name, count) in enumerate(sizes.items())
    }
    return {**files, "every": 1, "first": 1, "max_accuracy_loss": 0.1, "check_cost": 0.05}


def alone(model: Path, questions: dict[str, Any]) -> Recipe:
    rest = {"model": str(model), "early_exit": questions, "bench": {"threads": 1}}
    return parse_recipe(rest, "test.yaml")


def test_an_early_exit_is_fitted_and_held_against_other_rows(
    tiny: Path, tmp_path: Path, questions: dict[str, Any]
) -> None:
    pytest.importorskip("sklearn")
    out, display = tmp_path / "out", Recorder()
    result = pipeline.run(alone(tiny, questions), out, display)
    assert display.steps[:4] == [
        *("Open the model", "Open the model", "Run the tune rows", "Run the validation rows")
    ]
    (found,) = result["early_exit"]
    assert found["n"] == 24
    assert "answers" not in found
    rules = {entry["rule"]: entry for entry in found["rules"]}
    assert {"whole model", "early exit", "fixed threshold"} <= rules.keys()
    saved = rules["early exit"]["saved"]["estimate"]
    fitted = read_manifest(out / "early-exit" / "rule")
    assert fitted is not None
    assert fitted["early_exit"]["rows"] == {"tune": 48, "validation": 24}
    assert fitted["early_exit"]["check_cost"]["layers"] == 0.05
    said = (out / "report.md").read_text()
    assert f"Leaving early saves {100 * saved:.1f} %" in said
    assert said.count("| early exit |") == 1
    again = Recorder()
    assert pipeline.run(alone(tiny, questions), out, again)["early_exit"] == [found]
    assert again.steps == ["Open the model"]
    Path(questions["test"]).write_text(
        Path(write(tmp_path / "o.jsonl", made_up(16, 7))).read_text()
    )
    other = Recorder()
    (changed,) = pipeline.run(alone(tiny, questions), out, other)["early_exit"]
    assert changed["n"] == 16
    assert "Fit the early exit: unchanged, kept" in other.notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exits": {**EXITS, "at": [2, 6]}}, "no exit behind 6 layers"),
        ({"exits": {**EXITS, "tokens": 0}}, "tokens is 0. Say on how many"),
        ({"exits": {**EXITS, "init": "lens"}}, "unknown init of exits 'lens'"),
        ({"exits": {**EXITS, "export": [3]}}, "exits.at does not"),
        ({"exits": {**EXITS, "token": 3}}, "in exits: unknown key 'token'. Did you mean 'tokens'"),
        ({"exits": {**EXITS, "options": {"lr": 1}}}, "unknown option of training 'lr'"),
        ({"exits": {**EXITS, "options": {"window_tokens": 99}}}, "window_tokens is among the opt"),
        ({"exits": {**EXITS, "options": {"tokens": 9}}}, "Write it beside options, not in them"),
        ({"exits": {**EXITS, "options": {"loss": "ce"}}}, "unknown option of training 'loss'"),
        (
            {"exits": {**EXITS, "options": {"save_steps": "x"}}},
            "save_steps among the options of training is 'x'",
        ),
        ({"exits": {**EXITS, "export": [2, 2]}}, "exits.export names an exit twice"),
        ({"exits": {**EXITS, "window_tokens": 1 << 20}}, "exits.window_tokens is 1048576"),
        ({"exits": None}, "nothing to do. Add prune, exits or early_exit"),
        ({"heal": {"tokens": 64}}, "heal mends a cut, and there is no prune step"),
        ({"export": []}, "export is empty"),
        ({"exits": None, "early_exit": {"tune": "a", "test": "b"}}, "export is of pruned models"),
        ({"early_exit": {"tune": "no.jsonl", "test": "b"}}, "cannot read the text file no.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    display = Recorder()
    with pytest.raises(ShortstackError) as caught:
        pipeline.run(recipe(tiny, **changes), tmp_path / "out", display)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert display.steps == []
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_a_run_refuses(tiny: Path) -> None:
    for changes, said in (
        ({"exits": {**EXITS, "export": [3]}}, "exits.at does not"),
        ({"exits": {**EXITS, "tokens": 0}}, "tokens is 0"),
        ({"early_exit": {"tune": "no.jsonl", "test": "b"}}, "cannot read the text file"),
    ):
        with pytest.raises(ShortstackError, match=said):
            forecast(recipe(tiny, **changes))


@pytest.mark.parametrize("at", [[True], ["2"], [2.5]])
def test_exits_are_whole_numbers(tiny: Path, at: list[object]) -> None:
    with pytest.raises(ShortstackError, match=r"exits\.at"):
        recipe(tiny, exits={**EXITS, "at": at})


def test_text_is_asked_for_where_it_is_read(tiny: Path) -> None:
    given = {k: v for k, v in data(tiny).items() if k != "text"}
    with pytest.raises(ShortstackError, match=r"test.yaml: text is missing. Add it."):
        parse_recipe(given, "test.yaml")


def test_test_rows_that_were_tuned_on_are_refused(
    tiny: Path, tmp_path: Path, questions: dict[str, Any]
) -> None:
    pytest.importorskip("sklearn")
    leaking = {**questions, "test": [questions["test"], questions["tune"]]}
    with pytest.raises(ShortstackError, match="the tune and test rows share 48 questions"):
        pipeline.run(alone(tiny, leaking), tmp_path / "out", Recorder())


def test_a_recipe_without_exits_takes_no_step_of_them(tiny: Path) -> None:
    plain = recipe(tiny, exits=None, prune={"drop": 2})
    assert exit_steps.depths(plain, None) == []
    assert exit_steps.facts(None, []) is None


def test_a_dry_run_of_an_early_exit_alone(
    tiny: Path, tmp_path: Path, questions: dict[str, Any]
) -> None:
    file = tmp_path / "early.yaml"
    file.write_text(json.dumps({"model": str(tiny), "early_exit": questions}))
    assert main(["run", str(file), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    told = forecast(alone(tiny, questions))
    assert [row["step"] for row in told["steps"]] == ["early-exit"]
    assert told["n_layers"] == {"original": 6}
