"""Shared fixtures: a trained tiny Llama, real licence text."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.agreement import in_process

from shortstack import child

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On busy cores OpenMP's spinning threads make tiny models several times slower than one thread.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts background jobs with interrupts ignored, which children inherit: tests send them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A trained Llama: 6 layers, hidden 64, vocabulary 512, tied head, BF16 (make_tiny.py)."""
    return Path(__file__).parent / "data" / "tiny"


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let exports do in this process what they do in a child."""
    monkeypatch.setattr(child, "call", in_process)
    monkeypatch.setattr(child, "report_progress", lambda done, total: None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
