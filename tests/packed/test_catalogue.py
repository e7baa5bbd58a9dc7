"""Variants in one folder share what is equal, and each comes back byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.command_line import copy, fails
from tests.packed_models import write_coded

from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.errors import ShortstackError
from shortstack.folder_lock import alone_in
from shortstack.packed.catalogue import BLOBS, MEND, Variant, open_catalogue, variants
from shortstack.packed.catalogue_add import Cost, add
from shortstack.packed.choose import tries
from shortstack.packed.header import MOST_VALUES
from shortstack.packed.read import verify
from shortstack.packed.resident import Resident
from shortstack.packed.unpack import unpack_folder

ALLOWED = tries("zstd", "fast")


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """The tiny model and two cuts of it."""
    folder = tmp_path_factory.mktemp("cuts")
    found = {"base": copy(tiny, folder / "base")}
    for name, drop in (("one", "2"), ("two", "1-2")):
        found[name] = folder / name
        args = ["prune", str(tiny), "--drop", drop, "-o", str(found[name]), "--quiet"]
        assert main(args) == 0
        (found[name] / "shortstack.json").unlink()  # says when files were written
    return found


@pytest.fixture(scope="module")
def stored(
    cuts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Cost]]:
    folder = tmp_path_factory.mktemp("catalogue") / "models"
    open_catalogue(folder)
    costs = {name: add(folder, name, Checkpoint.open(path), ALLOWED) for name, path in cuts.items()}
    return folder, costs


def test_a_cut_costs_its_config_and_the_heads_of_its_files(
    stored: tuple[Path, dict[str, Cost]], cuts: dict[str, Path]
) -> None:
    folder, costs = stored
    assert variants(folder) == ["base", "one", "two"]
    for name in ("one", "two"):
        assert costs[name].n_shared == costs[name].n_tensors
        assert costs[name].new_bytes < 6000 < costs[name].coded_bytes
    blobs = sum(file.stat().st_size for file in (folder / BLOBS).iterdir())
    assert blobs == sum(cost.new_bytes for cost in costs.values())


def test_every_variant_comes_back_byte_for_byte(
    stored: tuple[Path, dict[str, Cost]], cuts: dict[str, Path], tmp_path: Path
) -> None:
    for name, original in cuts.items():
        assert (
            main(
                ["unpack", str(stored[0]), "--variant", name, "-o", str(tmp_path / name), "--quiet"]
            )
            == 0
        )
        for file in original.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_row_codes_and_floats_of_equal_weights_are_kept_apart(tiny: Path, tmp_path: Path) -> None:
    coded = write_coded(tiny, tmp_path / "coded")
    plain = copy(coded.path, tmp_path / "plain")
    (plain / "row_codes.safetensors").unlink()
    open_catalogue(tmp_path / "all")
    add(tmp_path / "all", "plain", Checkpoint.open(plain), ALLOWED)
    cost = add(tmp_path / "all", "coded", coded, ALLOWED)
    vectors = [info for info in coded.tensors.values() if len(info.shape) == 1]
    assert cost.n_shared == len(vectors)
    (tmp_path / "again").mkdir()
    again = unpack_folder(Variant(tmp_path / "all" / "coded.json"), tmp_path / "again")
    assert again.sha256 == coded.sha256


def test_a_variant_is_a_model_for_other_commands(
    stored: tuple[Path, dict[str, Cost]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["prune", str(stored[0] / "one.json"), "--drop", "0", "-o", str(tmp_path / "cut")]
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_layers"] == 4
    words = ("--at", "2", "--text", "spdx", "--tokens", "64", "-o", str(tmp_path / "exits"))
    told = fails(["exits", "train", str(stored[0] / "one.json"), *words, "-q"], capsys)
    how = f"shortstack unpack {stored[0] / 'one.json'} -o {tmp_path / 'folder'}"
    assert how.replace(str(tmp_path / "folder"), "FOLDER") in told
    assert main([*how.split()[1:], "-q"]) == 0  # what it says to do
    assert Checkpoint.open(tmp_path / "folder").n_layers == 5


def test_damage_in_a_catalogue_is_found_and_named(cuts: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "all"
    open_catalogue(folder)
    add(folder, "one", Checkpoint.open(cuts["one"]), ALLOWED)
    held = Variant(folder / "one.json")
    entry = held.contents.tensors["model.layers.3.mlp.up_proj.weight"]
    blob = folder / BLOBS / entry.coded_sha256
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 4
    blob.write_bytes(content)
    changed = rf"layers\.3\.mlp\.up_proj\.weight have changed\. {MEND}"
    with pytest.raises(ShortstackError, match=changed):
        verify(held)
    with pytest.raises(ShortstackError, match=changed):
        Resident(folder / "one.json").floats(entry.name)
    text = (folder / "one.json").read_text()
    for packed in ("{}", "," * (MOST_VALUES + 1)):
        sha256 = hashlib.sha256(packed.encode()).hexdigest()
        (folder / "one.json").write_text(json.dumps({"packed": packed, "sha256": sha256}))
        with pytest.raises(ShortstackError, match=MEND):
            Variant(folder / "one.json")
    (folder / "one.json").write_text(text)
    blob.unlink()
    with pytest.raises(ShortstackError, match=r"blob of model\.layers\.3\.mlp\.up_proj\.weight"):
        verify(held)
    (folder / "one.json").write_text(text.replace("zstd", "none", 1))
    with pytest.raises(ShortstackError, match="checksum is wrong"):
        Variant(folder / "one.json")


def flip(blob: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 4
    blob.write_bytes(content)


@pytest.mark.parametrize("coder", ["zstd", "ans"])
def test_adding_a_model_again_mends_its_blobs_in_every_variant(
    coder: str, cuts: dict[str, Path], tmp_path: Path
) -> None:
    """With another coder the blob has another checksum: variants point to the new one."""
    folder = tmp_path / "all"
    open_catalogue(folder)
    for name in ("base", "one"):
        add(folder, name, Checkpoint.open(cuts[name]), ALLOWED)
    entry = Variant(folder / "one.json").contents.tensors["model.layers.3.mlp.up_proj.weight"]
    flip(folder / BLOBS / entry.coded_sha256)
    other = Variant(folder / "base.json").contents.tensors["model.norm.weight"]
    (folder / BLOBS / other.coded_sha256).unlink()
    cost = add(folder, "one", Checkpoint.open(cuts["one"]), tries(coder, "fast"))
    assert len(cost.packings) == 2
    for name in ("base", "one"):
        verify(Variant(folder / f"{name}.json"))
        (tmp_path / name).mkdir()
        again = unpack_folder(Variant(folder / f"{name}.json"), tmp_path / name)
        assert again.sha256 == Checkpoint.open(cuts[name]).sha256


def test_a_document_that_is_damaged_hinders_no_other_and_is_written_again(
    cuts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "all")
    args = ["catalogue", "-o", folder, "--json", "--quiet"]
    assert main([*args, f"base={cuts['base']}"]) == 0
    (tmp_path / "all" / "base.json").write_text("{")
    assert "Add the model again under its name" in fails(
        ["unpack", folder, "-o", str(tmp_path / "x")], capsys
    )
    assert main([*args, f"one={cuts['one']}"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["damaged"] == ["base"]
    assert main([*args, f"base={cuts['base']}"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "damaged" not in answer
    assert answer["variants"][0]["n_shared"] > 0, "and no blob of it was thrown away"
    verify(Variant(tmp_path / "all" / "base.json"))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ShortstackError("bad")])
def test_a_run_that_is_stopped_leaves_nothing(
    fault: BaseException, cuts: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    open_catalogue(folder)
    add(folder, "one", Checkpoint.open(cuts["one"]), ALLOWED)
    (folder / ".two.trial").write_text("of a hard kill")
    (folder / BLOBS / ".new-1.partial").write_text("of a hard kill")
    before = {file for file in folder.rglob("*") if not file.name.startswith(".")}

    def stop(done: int, total: int) -> None:
        if done == total - 2:
            raise fault

    with pytest.raises((KeyboardInterrupt, ShortstackError)):
        add(folder, "base", Checkpoint.open(cuts["base"]), ALLOWED, stop)
    assert set(folder.rglob("*")) == before


def test_two_runs_at_once_and_one_that_adds_nothing(
    cuts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "all", str(cuts["base"])
    assert "two of the models are called" in fails(
        ["catalogue", f"a={base}", f"a={base}", "-o", str(folder)], capsys
    )
    fails(["catalogue", f"a={tmp_path}", "-o", str(folder), "--quiet"], capsys)
    assert not folder.exists()
    open_catalogue(folder)
    with alone_in(folder):
        assert "another shortstack is at work" in fails(
            ["catalogue", f"a={base}", "-o", str(folder), "--quiet"], capsys
        )


def test_a_taken_name_is_refused_before_anything_is_packed(
    stored: tuple[Path, dict[str, Cost]],
    cuts: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(stored[0])
    models = [f"new={cuts['two']}", f"one={cuts['base']}"]
    assert "another model already" in fails(["catalogue", *models, "-o", folder, "--quiet"], capsys)
    assert variants(stored[0]) == ["base", "one", "two"]


def test_what_cannot_be_a_catalogue_or_a_variant_is_refused(
    stored: tuple[Path, dict[str, Cost]],
    cuts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, base = str(stored[0]), str(cuts["base"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "no catalogue and not empty" in fails(
        ["catalogue", base, "-o", str(tmp_path / "other")], capsys
    )
    assert "another model already" in fails(
        ["catalogue", f"one={base}", "-o", folder, "--quiet"], capsys
    )
    assert "Name one: --variant base" in fails(
        ["unpack", folder, "-o", str(tmp_path / "x")], capsys
    )
    assert "Known: base, one, two" in fails(
        ["unpack", folder, "--variant", "three", "-o", str(tmp_path / "x")], capsys
    )
    assert variants(stored[0]) == ["base", "one", "two"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "Windows uses it") for name in ("con", "NUL", "com1", "lpt9", "aux.v2")),
        *((n, "the catalogue itself uses it") for n in ("blobs", "Shortstack", "Catalogue")),
        ("ONE", "has a variant one: ONE differs by case alone"),
    ],
)
def test_a_name_that_not_every_disk_can_have_is_refused(
    name: str,
    words: str,
    stored: tuple[Path, dict[str, Cost]],
    cuts: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = set(stored[0].rglob("*"))
    for model in ("one", "two"):
        args = ["catalogue", f"{name}={cuts[model]}", "-o", str(stored[0]), "--quiet"]
        assert words in fails(args, capsys)
        with pytest.raises(ShortstackError, match=words):
            add(stored[0], name, Checkpoint.open(cuts[model]), ALLOWED)
    assert set(stored[0].rglob("*")) == before


def test_two_new_names_that_differ_by_case_alone_are_refused(
    cuts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["catalogue", f"a={cuts['one']}", f"A={cuts['two']}", "-o", str(tmp_path / "all")]
    assert "called A in small and large letters" in fails(args, capsys)
    assert not (tmp_path / "all").exists()


def test_names_of_an_older_catalogue_can_still_be_mended(
    cuts: dict[str, Path], tmp_path: Path
) -> None:
    """What is told to do about damage is not refused for the name."""
    open_catalogue(tmp_path)
    add(tmp_path, "one", Checkpoint.open(cuts["one"]), ALLOWED)
    for name in ("aux", "ONE"):
        (tmp_path / f"{name}.json").write_text("{")
        add(tmp_path, name, Checkpoint.open(cuts["two"]), ALLOWED)
        verify(Variant(tmp_path / f"{name}.json"))
