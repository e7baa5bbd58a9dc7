"""A footprint counts what this process and its children hold, and no pages of mapped files."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shortstack import child
from shortstack.footprint import (
    PROCESS_BYTES,
    Footprint,
    against,
    anonymous_bytes,
    in_words,
    measured,
)

HELD = 64 * 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory")


def grown(footprint: Footprint) -> int:
    assert footprint.peak_anon_bytes is not None
    assert footprint.start_anon_bytes is not None
    return footprint.peak_anon_bytes - footprint.start_anon_bytes


def holds_until_told(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: hold memory, say so, and wait for the parent to have looked."""
    held = b"x" * HELD
    child.report_progress(1, 1)
    Path(request["fifo"]).read_bytes()
    return {"held": len(held)}


@linux
def test_memory_that_is_held_at_the_end_is_seen() -> None:
    held = []
    with measured() as meter:
        held.append(b"x" * HELD)
    assert HELD <= grown(meter.footprint) < HELD + 2**24


@linux
def test_pages_of_a_mapped_file_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * HELD)
    with (
        measured() as meter,
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert mapped.find(b"y") == -1
        meter.sample()
    assert grown(meter.footprint) < HELD // 4


@linux
def test_a_child_counts_while_it_lives(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = anonymous_bytes(os.getpid()) or 0
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        seen.append((anonymous_bytes(os.getpid()) or 0) - before)
        fifo.write_bytes(b"go on")

    child.call(
        "test_footprint:holds_until_told",
        {"fifo": str(fifo)},
        timeout_s=60,
        what="holding memory",
        progress=look,
        env={"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )
    assert HELD <= seen[0] < 2 * HELD
    assert (anonymous_bytes(os.getpid()) or 0) - before < HELD // 2


def test_work_that_fails_is_measured_too() -> None:
    with pytest.raises(KeyError), measured() as meter:
        raise KeyError
    assert meter.footprint.wall_s >= 0


def test_a_prediction_is_for_what_the_process_held_already() -> None:
    facts = against(Footprint(1.25, 300_000_000, PROCESS_BYTES + 7_000_000, 9), 400_000_000)
    assert in_words(facts) == "peak memory 300 MB, predicted 407 MB; time 1.2 s"


def test_where_the_system_does_not_tell_it_is_said() -> None:
    facts = against(Footprint(2.0, None, None, 1), 400_000_000)
    assert in_words(facts) == "peak memory unknown here, predicted 400 MB; time 2.0 s"
