"""Run one function in a fresh process and wait for it: for crashes, for clean measurements.

A native runtime can die of a signal or hang; in a child that is a fact to record, not our end.
The parent blocks on a pipe, it never polls. The pipe carries JSON lines: progress, then one result.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from typing import IO, Any

from shortstack import errors
from shortstack.errors import ShortstackError, one_line
from shortstack.progress import OnProgress, silent

PIPE = "SHORTSTACK_CHILD_PIPE"


class ChildCrashError(ShortstackError):
    """The child died of a signal, hung, or ended without a result. `reason` says which in words,
    `kind` (signal, timeout, exit) and `signal_name` to programs."""

    def __init__(
        self,
        what: str,
        reason: str,
        stderr: str = "",
        *,
        kind: str = "exit",
        signal_name: str | None = None,
    ) -> None:
        tail = one_line(" | ".join(stderr.strip().splitlines()[-3:]), 300)
        words = f" Last words: {tail}" if tail else ""
        super().__init__(f"{what} {reason}.{words} See what works here: shortstack doctor")
        self.reason = reason
        self.kind = kind
        self.signal_name = signal_name


def call(
    function: str,
    request: Mapping[str, Any],
    *,
    timeout_s: float,
    what: str,
    progress: OnProgress = silent,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Call `module:function(request)` in a fresh Python; return the dict that it returns.

    `what` names the work in errors. Raises what the child raised if that was a ShortstackError;
    ChildCrashError if it died of a signal, took longer than `timeout_s`, or hit a bug.
    """
    if os.name == "nt":  # Popen has no pass_fds there
        raise ShortstackError(f"{what}: Windows cannot run it in a child process. Use WSL.")
    read_fd, write_fd = os.pipe()
    with (
        open(read_fd, encoding="utf-8") as lines,
        tempfile.TemporaryFile() as question,
        tempfile.TemporaryFile() as stderr,
    ):
        question.write(json.dumps(request).encode())
        question.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "shortstack.child", function],
                stdin=question,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(write_fd,),
                env={**os.environ, **(env or {}), PIPE: str(write_fd)},
            )
        finally:
            os.close(write_fd)
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            process.kill()

        watchdog = threading.Timer(timeout_s, give_up)
        watchdog.start()
        try:
            answer = _read(lines, progress)  # ends when the child closes the pipe: at its death
            process.wait()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
        stderr.seek(0)
        words = stderr.read().decode(errors="replace")
    if timed_out.is_set():
        raise ChildCrashError(what, f"gave no answer in {timeout_s:g} s", words, kind="timeout")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        reason = f"died of signal {name}"
        raise ChildCrashError(what, reason, words, kind="signal", signal_name=name)
    if answer is None:
        raise ChildCrashError(what, f"ended with exit code {process.returncode}, no result", words)
    if "error" in answer:
        kind = getattr(errors, answer["kind"], ShortstackError)
        raise _rebuilt(kind, answer["error"])
    result: dict[str, Any] = answer["result"]
    return result


def report_progress(done: int, total: int) -> None:
    """In a child: tell the parent how far we are. Elsewhere: nothing."""
    _send({"progress": [done, total]})


def _rebuilt(kind: type[ShortstackError], message: str) -> ShortstackError:
    """Make an error of a class whose constructor takes other arguments than its message."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def _read(lines: IO[str], progress: OnProgress) -> dict[str, Any] | None:
    answer: dict[str, Any] | None = None
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a child that died in mid-line
            data = json.loads(line)
            if "progress" in data:
                progress(*data["progress"])
            else:
                answer = data
    return answer


def _send(data: Mapping[str, Any]) -> None:
    descriptor = os.environ.get(PIPE)
    if descriptor is not None:
        os.write(int(descriptor), json.dumps(data).encode() + b"\n")


def _main(function: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports Ctrl-C, once
    module, _, name = function.partition(":")
    answer: dict[str, Any]
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(json.load(sys.stdin))}
    except ShortstackError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except Exception:
        traceback.print_exc()
        return 1
    with contextlib.suppress(BrokenPipeError):  # a parent that is gone needs no traceback
        _send(answer)
    return 0


if __name__ == "__main__":
    code = _main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the answer is out; native libraries may crash while they tear down
