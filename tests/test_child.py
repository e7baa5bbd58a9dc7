"""A child process returns, fails, crashes, hangs or babbles; the parent always knows which."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from shortstack import child
from shortstack.errors import ShortstackError, VerificationError

HERE = "test_child"


def doubles(request: dict[str, Any]) -> dict[str, Any]:
    for done in range(3):
        child.report_progress(done + 1, 3)
    print("noise on standard output")
    return {"twice": 2 * request["n"], "pid": os.getpid(), "blob": "x" * request.get("size", 0)}


def refuses(request: dict[str, Any]) -> dict[str, Any]:
    raise VerificationError("the file differs")


def dies(request: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hangs(request: dict[str, Any]) -> dict[str, Any]:
    time.sleep(3600)
    return {}


def has_a_bug(request: dict[str, Any]) -> dict[str, Any]:
    return {"x": 1 // request["zero"]}


def exits(request: dict[str, Any]) -> dict[str, Any]:
    os._exit(3)


def run(function: str, timeout_s: float = 60, **request: Any) -> dict[str, Any]:
    path = os.path.dirname(__file__)
    env = {"PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    return child.call(f"{HERE}:{function}", request, timeout_s=timeout_s, what="the job", env=env)


def test_the_result_comes_from_another_process() -> None:
    result = run("doubles", n=21)
    assert result["twice"] == 42
    assert result["pid"] != os.getpid()


def test_a_result_larger_than_a_pipe_arrives_whole() -> None:
    assert len(run("doubles", n=1, size=1_000_000)["blob"]) == 1_000_000


def test_progress_arrives_in_order() -> None:
    seen: list[tuple[int, int]] = []
    path = os.path.dirname(__file__)
    child.call(
        f"{HERE}:doubles",
        {"n": 1},
        timeout_s=60,
        what="the job",
        env={"PYTHONPATH": path},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_users_error_keeps_its_class_and_words() -> None:
    with pytest.raises(VerificationError, match="^the file differs$") as caught:
        run("refuses")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("function", "timeout_s", "reason"),
    [
        ("dies", 60, "died of signal SIGSEGV"),
        ("hangs", 0.5, "gave no answer in 0.5 s"),
        ("exits", 60, "ended with exit code 3, no result"),
        ("has_a_bug", 60, "ended with exit code 1, no result"),
    ],
)
def test_a_child_that_fails_is_named_with_the_reason(
    function: str, timeout_s: float, reason: str
) -> None:
    with pytest.raises(child.ChildCrashError, match=reason) as caught:
        run(function, timeout_s, zero=0)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_bug_shows_its_last_words() -> None:
    with pytest.raises(ShortstackError, match="ZeroDivisionError"):
        run("has_a_bug", zero=0)


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "os", SimpleNamespace(name="nt"))
    with pytest.raises(ShortstackError, match="Windows cannot run it") as caught:
        child.call("test_child:doubles", {}, timeout_s=9, what="llama.cpp")
    assert "\n" not in str(caught.value)
