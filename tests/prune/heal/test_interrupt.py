"""A signal ends training behind a step whose state is saved; what is said of it is true."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.healing import Windows, read, settings

from shortstack.checkpoint import Checkpoint
from shortstack.prune.exits.train import ExitChoice, train_exits
from shortstack.prune.heal.interrupt import SIGNALS, held_back
from shortstack.prune.heal.train import heal


def interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def as_commands_do() -> Iterator[None]:
    before = {one: signal.signal(one, interrupt) for one in SIGNALS}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_run_that_is_told_to_stop_saves_what_it_did(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path, signum: signal.Signals
) -> None:
    """Long before the first state is due."""
    for name in ("whole", "stopped", "again"):
        (tmp_path / name).mkdir()
    whole, _ = heal(cut, original, *windows, tmp_path / "whole", settings())

    def stop(done: int, total: int) -> None:
        if done == 3:
            signal.raise_signal(signum)

    notes: list[str] = []
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        heal(
            *(cut, original, *windows, tmp_path / "stopped", settings()),
            progress=stop,
            note=notes.append,
            state=state,
        )
    assert notes[-1] == "interrupted: saved at step 3, the same command goes on from there"
    assert signal.getsignal(signum) is interrupt
    again, _ = heal(
        *(cut, original, *windows, tmp_path / "again", settings()), note=notes.append, state=state
    )
    assert "going on from step 3" in notes
    assert read(again) == read(whole)


def test_exits_are_saved_in_the_middle_of_a_step(
    original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    """The signal comes while step 4 is evaluated: that step ends first."""
    for name in ("whole", "stopped", "again"):
        (tmp_path / name).mkdir()
    asked, choice, state = settings(eval_steps=4), ExitChoice((2,)), tmp_path / "state"
    whole = train_exits(original, choice, *windows, tmp_path / "whole", asked)
    notes: list[str] = []

    def stop(text: str) -> None:
        notes.append(text)
        if text.startswith("step 4"):
            signal.raise_signal(signal.SIGTERM)

    given = (original, choice, *windows)
    with pytest.raises(KeyboardInterrupt):
        train_exits(*given, tmp_path / "stopped", asked, note=stop, state=state)
    assert notes[-1].startswith("interrupted: saved at step 4,")
    again = train_exits(*given, tmp_path / "again", asked, state=state)
    assert again.sha256 == whole.sha256


def test_where_nothing_is_saved_it_is_said(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    """As of the second signal, which does not wait."""
    notes: list[str] = []

    def twice(done: int, total: int) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        heal(
            *(cut, original, *windows, tmp_path / "out", settings()),
            progress=twice,
            note=notes.append,
            state=tmp_path / "state",
        )
    assert notes[-1] == "interrupted: no state was saved yet, the same command begins again"
    assert not (tmp_path / "state").exists()


def test_only_the_first_signal_is_held_back() -> None:
    with held_back() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked.to_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(one) for one in SIGNALS] == [interrupt, interrupt]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As Ctrl-C is in a job that a script runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back() as asked:
        signal.raise_signal(signal.SIGINT)
        assert not asked.to_stop
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_signals_are_left_alone() -> None:
    found: list[bool] = []

    def run() -> None:
        with held_back():
            found.append(signal.getsignal(signal.SIGTERM) is interrupt)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]
