"""`shortstack prune MODEL.gguf -o OUT.gguf`, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gguf_zoo import write_file

from shortstack.cli import main
from shortstack.commands.gguf_cut import check_file
from shortstack.errors import ShortstackError
from shortstack.gguf_header import read_header
from shortstack.intake import open_model
from shortstack.prune.plan import PrunePlan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_file(tmp_path / "whole.gguf", "gemma3", range(8), kind="Q8_0")


def error(capsys: pytest.CaptureFixture[str]) -> str:
    words = capsys.readouterr().err.strip().splitlines()
    assert len(words) == 1
    assert words[0].startswith("shortstack: ")
    return words[0]


def test_a_gguf_file_is_cut_into_a_gguf_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "cut.gguf"
    assert main(["prune", str(model), "--drop", "1,3-4", "-o", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert read_header(out).integer("gemma3.block_count") == 5
    assert said["size_bytes"] == out.stat().st_size < said["original_bytes"] == model.stat().st_size
    assert said["keys_changed"] == ["gemma3.block_count", "gemma3.attention.sliding_window_pattern"]
    assert said["least_runtime"] == "llama-cpp-python 0.3.36"
    assert said["checked"] == "opened in llama.cpp, one token decoded"
    assert [p.name for p in out.parent.iterdir()] == ["cut.gguf"]


def test_a_plan_decides_like_the_option(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(PrunePlan(8, (1, 3, 4), "explicit").to_json())
    for name, choice in (("a", ["--drop", "1,3-4"]), ("b", ["--plan", str(plan)])):
        assert main(["prune", str(model), *choice, "-o", str(tmp_path / f"{name}.gguf"), "-q"]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_dry_run_says_the_size_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut.gguf"
    command = ["prune", str(model), "--drop", "1", "-o", str(out), "--json"]
    assert main([*command, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main(command) == 0
    assert out.stat().st_size == said["size_bytes"]


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut.gguf"
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:-100])
    other = tmp_path / "other.json"
    other.write_text(PrunePlan(9, (1,), "explicit").to_json())
    before = sorted(tmp_path.iterdir())
    refused = {
        "names sub-blocks": [str(model), "--drop", "1.mlp"],
        "no layer 8": [str(model), "--drop", "8"],
        "truncated or damaged": [str(damaged), "--drop", "1"],
        "one of them": [str(model)],
        "is for 9 layers": [str(model), "--plan", str(other)],
        "is no plan": [str(model), "--plan", str(damaged)],
        "is none: layers are cut file to file": [str(tiny), "--drop", "1"],
    }
    for words, arguments in refused.items():
        assert main(["prune", *arguments, "-o", str(out)]) == 2
        assert words in error(capsys)
    assert main(["prune", str(model), "--drop", "1", "-o", str(model)]) == 2
    assert "is not overwritten" in error(capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_llama_cpp_cannot_run_gets_no_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Qwen 3 without its norms of queries and keys: a sound header, no model."""
    source = write_file(tmp_path / "whole.gguf", "llama", range(3))
    named = source.read_bytes().replace(b"llama.", b"qwen3.").replace(b"llama", b"qwen3", 1)
    source.write_bytes(named)
    assert main(["prune", str(source), "--drop", "1", "-q", "-o", str(tmp_path / "cut.gguf")]) == 2
    words = error(capsys)
    assert "llama.cpp cannot open the cut file" in words
    assert "'blk.0.attn_k_norm.weight' not found" in words
    assert list(tmp_path.iterdir()) == [source]


def test_a_file_with_nan_weights_is_not_taken_for_a_model(tmp_path: Path) -> None:
    source = write_file(tmp_path / "whole.gguf", "llama", [0])
    header = read_header(source)
    norm = next(t for t in header.tensors if t.name == "output_norm.weight")
    with source.open("rb+") as stream:
        stream.seek(header.data_start + norm.offset)
        stream.write(b"\xff" * norm.n_bytes)
    with pytest.raises(ShortstackError, match="llama.cpp cannot run the cut file"):
        check_file(source)


def test_the_cut_imports_neither_torch_nor_numpy_nor_gguf(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from shortstack.prune.gguf_cut import cut_gguf, plan_cut\n"
        f"cut_gguf(plan_cut(Path({str(model)!r}), (1,)), Path({str(tmp_path / 'cut.gguf')!r}))\n"
        "heavy = [m for m in ('torch', 'numpy', 'gguf', 'transformers') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "cut.gguf").is_file()


def test_opening_a_file_refuses_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    few = {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    source = write_file(tmp_path / "whole.gguf", "llama", range(2), keys=few)
    with pytest.raises(ShortstackError, match="has 3 tokens, its embedding 128 rows"):
        open_model(str(source), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [source]
