"""The trials of a campaign as they come in, one JSON line each: a killed campaign goes on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

Key = tuple[str, int, int]
"""(kind, round, case) of a trial."""


class Journal:
    """Keeps outcomes by trial; without a file, in memory alone.

    Lines: `{"sitting": n}` each time the campaign is started, then its trials. A last line that
    was cut by a kill is dropped. With `retry`, failures are forgotten: what failed runs again.
    """

    def __init__(self, file: Path | None = None, *, retry: bool = False) -> None:
        self._file = file
        self._kept: dict[Key, dict[str, Any]] = {}
        self.sitting = 0
        self._offset_s = 0.0
        if file is not None and file.exists():
            self._read(file)
        if retry:
            self._kept = {k: told for k, told in self._kept.items() if "failure" not in told}
        self._opened = time.perf_counter()
        self._write({"sitting": self.sitting})

    @property
    def clock_s(self) -> float:
        """Seconds that the campaign has run, pauses between its sittings left out."""
        return self._offset_s + time.perf_counter() - self._opened

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._kept.get(key)

    def add(self, key: Key, outcome: dict[str, Any]) -> None:
        """Keep one trial's outcome, on disk before this returns."""
        self._kept[key] = outcome
        self._write({"trial": list(key), "ended_s": self.clock_s, "outcome": outcome})

    def _read(self, file: Path) -> None:
        raw = file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(file, len(whole))
        try:
            for line in map(json.loads, whole.splitlines()):
                if "trial" in line:
                    kind, number, case = line["trial"]
                    self._kept[kind, number, case] = line["outcome"]
                    self._offset_s = line["ended_s"]
                else:
                    self.sitting = line["sitting"] + 1
        except (ValueError, KeyError, TypeError) as error:
            raise ShortstackError(
                f"{file} is damaged ({type(error).__name__}). Remove its folder and measure again."
            ) from None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
