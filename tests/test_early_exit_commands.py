"""`shortstack exits fit` and `shortstack eval --early-exit`, and files that were tampered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tests.test_trim_command import write
from tests.trimming import made_up

from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.commands import early_exit_eval
from shortstack.early_exit.prompts import LETTERS, WORDS, Style, choose_style, encode, with_examples
from shortstack.early_exit.rule import Rule
from shortstack.early_exit.rule_file import read_rule, write_rule
from shortstack.errors import ShortstackError
from shortstack.evaluate.codec import FolderCodec
from shortstack.questions import Question

pytest.importorskip("sklearn")


def eval_command(model: Path, test: str | Path, rule: Path, folder: Path) -> list[str]:
    words = ["eval", str(model), "--threads", "1", "--choice", str(test)]
    return [*words, "--early-exit", str(rule), "-o", str(folder / "out")]


@pytest.fixture
def fit_command(tiny: Path, tmp_path: Path) -> list[str]:
    rows = write(tmp_path / "tune.jsonl", made_up(72))
    out = str(tmp_path / "exit.safetensors")
    return [
        *("exits", "fit", str(tiny), "--tune", rows, "-o", out, "--every", "1", "--first", "1"),
        *("--max-accuracy-loss", "0.1", "--check-cost", "0", "--threads", "1", "--json"),
    ]


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_from_questions_to_layers_saved(
    tiny: Path,
    tmp_path: Path,
    fit_command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(fit_command) == 0
    fitted = said(capsys)
    assert fitted["rows"] == {"tune": 48, "validation": 24}
    assert fitted["validation"]["loss"] <= 0.1
    write(tmp_path / "test.jsonl", made_up(24, seed=9))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    command = ["eval", str(tiny), "--threads", "1", "--choice", "test.jsonl", "-o", str(out)]
    assert main([*command, "--early-exit", fitted["classifier"], "--json"]) == 0
    (result,) = said(capsys)["results"]
    assert result["n"] == 24
    assert result["set"] == f"{tmp_path.name}/test"
    rules = {entry["rule"]: entry for entry in result["rules"]}
    assert "early exit" in rules
    assert "fixed threshold" in rules
    layers = result["answers"]["early exit"]["layers"]
    assert rules["early exit"]["saved"]["estimate"] == pytest.approx(1 - sum(layers) / 6 / 24)
    assert (out / "early_exit.md").read_text().count("| early exit |") == 1
    assert main(fit_command) == 0  # an early exit is replaced


def test_what_a_check_takes_is_measured_and_can_be_repeated(
    fit_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = fit_command.index("--check-cost")
    assert main([*fit_command[:told], *fit_command[told + 2 :], "--quiet"]) == 0
    measured = said(capsys)
    cost = measured["check_cost"]
    assert cost["measured"]
    assert cost["layers"] == max(round(cost["check_s"] / cost["layer_s"], 3), 0.001)
    assert read_rule(Path(measured["classifier"])).facts["check_cost"] == cost
    assert main([*fit_command, "--check-cost", str(cost["layers"])]) == 0
    again = said(capsys)
    assert not again["check_cost"]["measured"]
    assert {**again, "check_cost": cost} == measured


def test_only_a_check_that_is_timed_is_shown_as_a_step(
    fit_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = fit_command.index("--check-cost")
    assert main(fit_command[:-1]) == 0  # but --json, which shows no steps
    shown = capsys.readouterr().err
    assert "Run the validation rows" in shown
    assert "Time a check" not in shown
    assert main([*fit_command[:told], *fit_command[told + 2 : -1]]) == 0
    assert "Time a check" in capsys.readouterr().err


def test_the_folder_of_a_packed_model_names_the_file_and_how_it_is_unpacked(
    tmp_path: Path, fit_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_command) == 0
    write(tmp_path / "test.jsonl", made_up(24, seed=9))
    (tmp_path / "packed").mkdir()
    file = tmp_path / "packed" / "model.packed.safetensors"
    file.touch()
    rule = tmp_path / "exit.safetensors"
    capsys.readouterr()
    command = eval_command(file.parent, tmp_path / "test.jsonl", rule, tmp_path)
    assert main([*command, "--quiet"]) == 2
    assert f"shortstack unpack {file} -o FOLDER" in capsys.readouterr().err


def test_another_model_is_refused(
    tiny: Path, tmp_path: Path, fit_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_command) == 0
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    config = json.loads((other / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 5000.0
    (other / "config.json").write_text(json.dumps(config))
    command = ["eval", str(other), "--choice", fit_command[4], "-o", str(tmp_path / "out")]
    assert main([*command, "--early-exit", str(tmp_path / "exit.safetensors")]) == 2
    assert "was fitted to another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def a_rule() -> Rule:
    return Rule(
        layers=(2, 4),
        check="answers",
        weights=np.ones((2, 3), np.float32),
        bias=np.zeros(2, np.float32),
        threshold=1.5,
        model_sha256="ab" * 32,
        n_layers=6,
        facts={"rows": 3},
    )


def test_a_rule_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "rule.safetensors"
    write_rule(a_rule(), file)
    found = read_rule(file)
    assert (found.layers, found.threshold, found.facts) == ((2, 4), 1.5, {"rows": 3})
    assert np.array_equal(found.weights, a_rule().weights)
    assert list(tmp_path.iterdir()) == [file]


def edited(file: Path, **changes: str) -> None:
    with safe_open(file, framework="np") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
        told = dict(opened.metadata())
    if "weights" in changes:
        arrays["weights"] = arrays["weights"] * 2
        del changes["weights"]
    for old, new in changes.items():
        told["facts"] = told["facts"].replace(old, new)
    save_file(arrays, file, told)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "twice"}, "was changed after it was written"),
        ({'"threshold": 1.5': '"threshold": 0.5'}, "was changed after it was written"),
        ({'"schema": 1': '"schema": 7'}, "of schema 7, this shortstack reads 1"),
        ({'"schema"': '"scheme"'}, "does not say what it holds"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    file = tmp_path / "rule.safetensors"
    write_rule(a_rule(), file)
    edited(file, **changes)
    with pytest.raises(ShortstackError, match=words):
        read_rule(file)


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", float("nan")), ("threshold", "x"), ("layers", (True, 4))]
)
def test_values_that_no_fit_gives_are_refused(tmp_path: Path, name: str, value: object) -> None:
    """With the checksum of what they stand in: a file that somebody made."""
    file = tmp_path / "rule.safetensors"
    made = a_rule()
    object.__setattr__(made, name, value)  # past what the class would say
    write_rule(made, file)
    with pytest.raises(ShortstackError, match="lacks what an early exit needs"):
        read_rule(file)


def test_files_that_are_no_rules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="no file"):
        read_rule(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("words")
    with pytest.raises(ShortstackError, match="cannot be read"):
        read_rule(tmp_path / "text.safetensors")
    save_file({"weights": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ShortstackError, match="no early exit of shortstack"):
        read_rule(tmp_path / "other.safetensors")


def test_a_model_is_no_early_exit_whatever_its_type(tiny: Path) -> None:
    """Its numbers are bfloat16, which numpy lacks."""
    with pytest.raises(ShortstackError, match="no early exit of shortstack"):
        read_rule(tiny / "model.safetensors")


def test_no_prompt_is_longer_than_the_models_context(
    tiny: Path, tmp_path: Path, fit_command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation as in fitting: beyond it the model is not right."""
    assert main(fit_command) == 0
    row = {"question": "Word " * 900, "choices": ["yes", "no"], "answer": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    lengths: list[int] = []

    def noted(*given: Any) -> Any:
        prompts = encode(*given)
        lengths.extend(len(prompt.tokens) for prompt in prompts)
        return prompts

    monkeypatch.setattr(early_exit_eval, "encode", noted)
    command = eval_command(tiny, tmp_path / "test.jsonl", tmp_path / "exit.safetensors", tmp_path)
    assert main([*command, "--quiet"]) == 0
    assert lengths == [Checkpoint.open(tiny).config["max_position_embeddings"]]


def test_prompts_that_were_cut_are_counted_and_said(
    tiny: Path, tmp_path: Path, fit_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    room, codec = 24, FolderCodec(tiny)
    rows = made_up(72)
    encoded = encode(codec, rows, Style(WORDS), 1000)
    long = sum(len(prompt.tokens) > room for prompt in encoded)
    assert 0 < long < len(rows)
    assert [prompt.cut_tokens for prompt in encoded] == [0] * len(rows)
    narrow = fit_command[: fit_command.index("--json")]
    assert main([*narrow, "--context", str(room)]) == 0
    words = f"prompts were cut to their last {room} tokens"
    assert words in " ".join(capsys.readouterr().err.split())
    rule = tmp_path / "exit.safetensors"
    assert sum(read_rule(rule).facts["cut_prompts"].values()) == long
    rows = made_up(24, seed=9)
    long = sum(len(prompt.tokens) > room for prompt in encode(codec, rows, Style(WORDS), 1000))
    test, out = write(tmp_path / "test.jsonl", rows), tmp_path / "out"
    assert main([*eval_command(tiny, test, rule, tmp_path), "--context", str(room)]) == 0
    assert f"{long} of 24 {words}" in " ".join(capsys.readouterr().err.split())
    (result,) = json.loads((out / "early_exit.json").read_text())["results"]
    assert result["cut_prompts"] == long
    assert f"{long} prompts without their beginning" in (out / "early_exit.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": (4, 2)}, "rising"),
        ({"layers": (2, 6)}, "after 6 of 6 layers is none"),
        ({"layers": (2,)}, "weights have the shape"),
        ({"check": "probe"}, "probe have the shape None"),
    ],
)
def test_rules_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShortstackError, match=words):
        Rule(**{**vars(a_rule()), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--max-accuracy-loss", "1.5"], "--max-accuracy-loss must be from 0"),
        (["--check", "guess"], "--check is 'guess'"),
        (["--check-cost", "-1"], "--check-cost must be 0 or more layers"),
        (["--check-cost", "99"], "no threshold saves time where a check takes 99 of a layer's"),
        (["-o", "exit.json"], "must end in .safetensors"),
        (["--shots", "900"], "900 examples are asked for"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(
    fit_command: list[str],
    changes: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*fit_command, *changes]) == 2
    assert words in capsys.readouterr().err


def test_too_few_rows_are_refused_before_any_is_run(
    fit_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one row a third is none."""
    assert main([*fit_command, "--rows", "1"]) == 2
    assert "there are 1 tune rows; 16 are needed" in capsys.readouterr().err


def test_two_models_have_no_one_early_exit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "test.jsonl", made_up(4))
    command = ["eval", str(tiny), str(tiny), "--choice", rows, "-o", str(tmp_path / "out")]
    assert main([*command, "--early-exit", str(tmp_path / "x.safetensors")]) == 2
    assert "--early-exit is of one model" in capsys.readouterr().err


ALIKE = Question("1", "Which?", ("the cat", "the dog"), 0)


def test_answers_that_begin_alike_become_letters(tiny: Path) -> None:
    codec = FolderCodec(tiny)
    assert choose_style(codec, made_up(2)) == WORDS
    assert choose_style(codec, [ALIKE]) == LETTERS
    with pytest.raises(ShortstackError, match="begin with the same token"):
        choose_style(codec, [ALIKE], WORDS)
    (prompt,) = encode(codec, [ALIKE], Style(LETTERS), 64)
    text = codec.decode(list(prompt.tokens))
    assert text.endswith("Question: Which?\nA. the cat\nB. the dog\nAnswer:")
    assert prompt.words == ("A", "B")


def test_examples_show_every_answer(tiny: Path) -> None:
    style = with_examples(WORDS, made_up(40), 4, seed=1)
    assert style.examples.count("Answer: yes") == style.examples.count("Answer: no") == 2
    assert style.examples.endswith("\n\n")
