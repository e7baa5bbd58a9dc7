"""The commands: export, prove, unpack; on to a GGUF file with the very codes, and its download."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tests.command_line import fails
from tests.packed_models import pack, write_coded

from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.packed.file import PackedFile


def run(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert main([*args, "--json"]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of a few tokens."""
    from shortstack.commands import stages
    from shortstack.recipe import VerifyRecipe

    few = VerifyRecipe(windows=2, window_tokens=32, decode_tokens=8)
    monkeypatch.setattr(stages, "VerifyRecipe", lambda: few)


def test_packing_and_its_proof_open_no_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch and transformers are not even installed."""
    for package in ("torch", "transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, package, None)
    run(capsys, "export", str(tiny), "--to", "packed", "-o", str(tmp_path / "packed"))
    file = tmp_path / "packed" / "model.packed.safetensors"
    assert run(capsys, "unpack", str(file.parent), "--check")["whole"]
    run(capsys, "unpack", str(file.parent), "-o", str(tmp_path / "by-folder"))
    assert Checkpoint.open(tmp_path / "by-folder").sha256 == Checkpoint.open(tiny).sha256
    run(capsys, "unpack", str(file), "-o", str(tmp_path / "again"))


def test_a_packing_that_does_not_prove_equal_leaves_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coder that loses the last bit of a byte: hashes agree, tensors do not."""
    from shortstack.packed.coders import none

    monkeypatch.setattr(none, "decode", lambda coded, *_: np.frombuffer(coded, np.uint8) & 0xFE)
    args = ["export", str(tiny), "--to", "packed", "--option", "coder=none"]
    assert main([*args, "-o", str(tmp_path / "packed")]) != 0
    assert "does not unpack to what it was made of" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_export_packs_and_proves_and_unpack_gives_the_folder_back(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run(capsys, "export", str(tiny), "--to", "packed", "-o", str(tmp_path / "packed"))
    checkpoint = Checkpoint.open(tiny)
    tensors = len(checkpoint.tensors)
    assert answer["proof"] == {"equal_bytes": checkpoint.n_bytes, "tensors": tensors}
    names = sorted(file.name for file in (tmp_path / "packed").iterdir())
    assert names == ["model.packed.safetensors", "shortstack.json", "worth.json"]
    file = tmp_path / "packed" / "model.packed.safetensors"
    run(capsys, "unpack", str(file), "-o", str(tmp_path / "again"))
    assert Checkpoint.open(tmp_path / "again").sha256 == Checkpoint.open(tiny).sha256
    rows = answer["worth"]
    assert isinstance(rows, list)
    assert sum(row["n_tensors"] for row in rows) == len(PackedFile(file).contents.tensors)


@pytest.mark.usefixtures("quick")
def test_unpack_goes_on_to_gguf_and_its_download(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded = write_coded(tiny, tmp_path / "coded")
    run(capsys, "export", str(coded.path), "--to", "packed", "-o", str(tmp_path / "packed"))
    file = str(tmp_path / "packed" / "model.packed.safetensors")
    out = tmp_path / "gguf"
    answer = run(capsys, "unpack", file, "--to", "gguf:Q8_0", "--zst", "-o", str(out))
    artifact = answer["artifact"]
    assert isinstance(artifact, dict)
    assert any("keep their row codes" in note for note in artifact["notes"])
    plain, coded_bytes = out / "model-Q8_0.gguf", (out / "model-Q8_0.gguf.zst").read_bytes()
    assert zstandard.ZstdDecompressor().decompress(coded_bytes) == plain.read_bytes()
    assert len(coded_bytes) < 0.75 * plain.stat().st_size
    direct = tmp_path / "direct"
    run(capsys, "export", str(coded.path), "--to", "gguf:Q8_0", "-o", str(direct))
    tensors = plain.read_bytes()[-50_000:]
    assert (direct / plain.name).read_bytes()[-50_000:] == tensors


def test_check_holds_a_file_against_its_checksums_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded = write_coded(tiny, tmp_path / "coded")
    file = pack(coded, tmp_path / "x.safetensors").path
    before = sorted(tmp_path.rglob("*"))
    answer = run(capsys, "unpack", str(file), "--check")
    assert (answer["whole"], answer["n_tensors"]) == (True, len(coded.tensors))
    packed, content = PackedFile(file), bytearray(file.read_bytes())
    entry = packed.contents.tensors["model.layers.2.mlp.up_proj.weight"]
    with packed.open_blob(entry) as blob:
        content[blob.tell() + 7] ^= 1
    file.write_bytes(content)
    assert "layers.2.mlp.up_proj.weight have changed" in fails(
        ["unpack", str(file), "--check", "--quiet"], capsys
    )
    assert "One of them" in fails(["unpack", str(file)], capsys)
    assert "One of them" in fails(
        ["unpack", str(file), "--check", "-o", str(tmp_path / "o")], capsys
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_unpacked_is_refused_in_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")]
    plain = str(tiny / "model.safetensors")
    assert "not a packed model" in fails(["unpack", plain, *out], capsys)
    assert "no packed file" in fails(["unpack", str(tmp_path / "none"), *out], capsys)
    assert "unpack writes hf, gguf:Q8_0" in fails(
        ["unpack", plain, "--to", "gguf:Q4_0", *out], capsys
    )
    assert "--zst is for GGUF" in fails(
        ["export", str(tiny), "--to", "packed", "--zst", *out], capsys
    )
    assert "unknown value of coder" in fails(
        ["export", str(tiny), "--to", "packed", "--option", "coder=zip", *out], capsys
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_a_packed_file_is_a_model_to_export_to_measure_and_to_evaluate(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "export", str(tiny), "--to", "packed", "-o", str(tmp_path / "packed"))
    file = str(tmp_path / "packed" / "model.packed.safetensors")
    out = ["-o", str(tmp_path / "out")]
    text = str(tmp_path / "words.txt")
    Path(text).write_text("Permission is hereby granted, free of charge, to any person. " * 50)
    expected = run(capsys, "export", file, "--to", "packed", "--dry-run", *out)
    assert Path(file).stat().st_size < int(str(expected["size_bytes"]))
    assert not (tmp_path / "out").exists()
    few = ["--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "1", "--no-ceilings"]
    run(capsys, "bench", file, *few, *out, "--dry-run")
    place = str(tmp_path / "packed")
    made: Any = run(capsys, "bench", place, *few, *out, "--memory-repeats", "0")
    (measured,) = made["measurements"]
    assert (measured["runtime"], measured["failed"]) == ("pytorch-packed", False)
    assert measured["kv_bytes_per_token"]
    given = ["--text", text, "--window-tokens", "32", "--limit", "2"]
    made = run(capsys, "eval", file, *given, "-o", str(tmp_path / "eval"))
    assert made["models"][0]["runtime"] == "pytorch-packed"


def test_what_needs_a_folder_names_the_packed_file_and_how_it_is_unpacked(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "packed", str(tmp_path / "out")
    run(capsys, "export", str(tiny), "--to", "packed", "-o", str(folder))
    file = folder / "model.packed.safetensors"
    how = f"shortstack unpack {file} -o FOLDER"
    rows = tmp_path / "rows.jsonl"
    questions = ({"question": f"Is {n} odd?", "choices": ["no", "yes"]} for n in range(99))
    rows.write_text(
        "".join(json.dumps({**q, "answer": n % 2}) + "\n" for n, q in enumerate(questions))
    )
    train = ("--text", "spdx", "--tokens", "64", "-o", out, "-q")
    for model in (file, folder):
        told = fails(["exits", "train", str(model), "--at", "2", *train], capsys)
        assert told.endswith((f"{how}.", how))
        assert "prune" not in told
        assert how in fails(["heal", str(model), *train], capsys)
    told = fails(["plan", str(folder), "--drop", "2", "-o", out, "-q"], capsys)
    assert "it has no config.json" in told
    assert told.endswith(how)
    fit = ["exits", "fit", str(folder), "--tune", str(rows), "-o", f"{out}.safetensors", "-q"]
    assert fails(fit, capsys).endswith(how)
    (folder / "other.packed.safetensors").write_bytes(b"")
    told = fails(["plan", str(folder), "--drop", "2", "-o", out, "-q"], capsys)
    assert "Name a folder with config.json" in told, "of two it cannot tell which"
