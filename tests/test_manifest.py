"""Output folders appear whole or not at all, and only over what is ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.manifest import check_ours, finished, staged, step_key, write_manifest
from shortstack.progress import Quiet
from shortstack.run_folder import RunFolder


def build(folder: Path, key: str, content: str = "data") -> None:
    with staged(folder, "step") as partial:
        (partial / "file").write_text(content)
        write_manifest(partial, "step", key, {})


def fail_halfway(folder: Path, error: type[BaseException]) -> None:
    with staged(folder, "step") as partial:
        (partial / "file").write_text("half")
        raise error


def test_a_finished_step_is_found_again_by_its_key(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    key = step_key("step", {"input": "sha"})
    build(folder, key)
    assert finished(folder, key) is not None
    assert finished(folder, step_key("step", {"input": "other"})) is None


def test_a_changed_file_makes_a_step_unfinished(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    build(folder, "key")
    (folder / "file").write_text("dat")
    assert finished(folder, "key") is None


def test_a_flipped_byte_is_noticed_and_a_copied_folder_is_not_suspected(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    build(folder, "key", "data")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert finished(tmp_path / "copy", "key") is not None
    (folder / "file").write_text("dada")
    assert finished(folder, "key") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ShortstackError])
def test_a_failed_step_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    folder = tmp_path / "deep" / "out"
    with pytest.raises(error):
        fail_halfway(folder, error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_step_keeps_the_older_result(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    build(folder, "key", "older")
    with pytest.raises(RuntimeError):
        fail_halfway(folder, RuntimeError)
    assert (folder / "file").read_text() == "older"


def test_what_a_hard_kill_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "stale").write_text("stale")
    build(tmp_path / "out", "key")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale").exists()


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ShortstackError, match="was not made by shortstack"):
        build(tmp_path, "key")
    file = tmp_path / "thesis.txt"
    with pytest.raises(ShortstackError, match="is a file, not a folder"):
        check_ours(file, "step")
    assert file.read_text() == "precious"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder.claim(out, {}, Quiet()):  # noqa: SIM117  # the second claim must fail inside
        with pytest.raises(ShortstackError, match="another shortstack is at work"):
            RunFolder.claim(out, {}, Quiet()).__enter__()
    with RunFolder.claim(out, {}, Quiet()):
        pass


def test_a_folder_that_another_run_fills_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with staged(folder, "step") as partial:
        (partial / "file").write_text("first")
        with pytest.raises(ShortstackError, match=f"another shortstack is at work in {folder}"):
            build(folder, "second")
        write_manifest(partial, "step", "first", {})
    assert (folder / "file").read_text() == "first"
    assert finished(folder, "first") is not None
    build(folder, "second")  # nobody else is at work any more
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "file").write_text("old")
    (left / "link").symlink_to(tmp_path)
    build(tmp_path / "out", "key")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["file", "shortstack.json"]
    assert not left.exists()


def test_what_another_run_begins_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a result is in its place the name of the temporary folder is free."""
    theirs, replace = tmp_path / ".out.partial" / "theirs", os.replace

    def replaced(source: Path, target: Path) -> None:
        replace(source, target)
        theirs.parent.mkdir()
        theirs.write_text("of another run")

    monkeypatch.setattr(os, "replace", replaced)
    with staged(tmp_path / "out", "step"):
        pass
    assert theirs.is_file()
