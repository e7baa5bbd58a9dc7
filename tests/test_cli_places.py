"""Where results go: nothing of the user's is touched, nothing half-written stays."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.command_line import copy, fails, shortstack, write_recipe

from shortstack.cli import main
from shortstack.errors import ShortstackError
from shortstack.manifest import check_place, read_manifest


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


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("plan", "--method", "last", "--drop", "2"), "plan.json"),
        (("fit-packed",), "plan.json"),
        (("exits", "fit", "--tune", "none.jsonl"), "exit.safetensors"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_looked_at(
    words: tuple[str, ...], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    said = fails([*words, "no-model", "-o", str(file / "below" / name)], capsys)
    assert f"{file} is a file" in said


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Root may write everywhere: be somebody else meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_folder_that_takes_nothing_is_told_at_once(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with nobody(), pytest.raises(ShortstackError, match="nothing can be written in"):
        check_place(closed / "below" / "plan.json")
    assert not list(closed.iterdir())


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
