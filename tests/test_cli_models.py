"""A model that is broken or unlike any we know: one line, exit code 2, nothing on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.command_line import change_config, copy, fails, write_recipe


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


def test_a_tokenizer_that_cannot_be_exported_is_refused_before_layers_are_chosen(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = strange_tokenizer(copy(tiny, tmp_path / "model"))
    out = tmp_path / "out"
    fails(["run", str(write_recipe(tmp_path, model)), "-o", str(out), "-q"], capsys)
    assert not out.exists()
