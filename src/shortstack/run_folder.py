"""The output folder of a run: claimed once, filled step by step, each step skipped when done."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack import __version__
from shortstack.folder_lock import alone_in
from shortstack.manifest import (
    MANIFEST,
    SCHEMA,
    check_ours,
    finished,
    staged,
    step_key,
    write_manifest,
    write_text,
)
from shortstack.progress import Display, OnProgress

Make = Callable[[Path, OnProgress], Mapping[str, Any]]
"""Fills a staging folder; returns the facts that its manifest shall carry."""
MakeBySteps = Callable[[Path, Display], Mapping[str, Any]]
"""The same, where it shows several steps itself."""


@dataclass(frozen=True)
class RunFolder:
    """A claimed output folder and where its steps are shown."""

    path: Path
    display: Display

    @classmethod
    @contextlib.contextmanager
    def claim(cls, path: Path, facts: Mapping[str, Any], display: Display) -> Iterator[RunFolder]:
        """Take `path` for a run. A run that fails before its first finished step leaves nothing.

        Raises ShortstackError if the folder holds something that is not ours.
        """
        check_ours(path, "run")
        fresh = not (path / MANIFEST).is_file()
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        head = {"tool": "shortstack", "version": __version__, "schema": SCHEMA, "step": "run"}
        with alone_in(path):
            write_text(path / MANIFEST, json.dumps({**head, **facts}, indent=2) + "\n")
            try:
                yield cls(path, display)
            except BaseException:
                if fresh and not any(p for p in path.iterdir() if p.name != MANIFEST):
                    (path / MANIFEST).unlink()
                    if made:
                        shutil.rmtree(path)
                raise

    def holds(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether `build` would keep the folder `name`."""
        return finished(self.path / name, step_key(name, inputs)) is not None

    def build(
        self, name: str, title: str, inputs: Mapping[str, Any], make: Make
    ) -> tuple[Path, dict[str, Any]]:
        """Make the folder `name`, unless it holds what the same inputs gave before.

        Returns the folder and its manifest.
        """
        kept = self._kept(name, title, inputs)
        if kept is None:
            with self.display.step(title) as progress:
                kept = self._made(name, inputs, lambda partial: make(partial, progress))
        return self.path / name, kept

    def build_by_steps(
        self, name: str, title: str, inputs: Mapping[str, Any], make: MakeBySteps
    ) -> tuple[Path, dict[str, Any]]:
        """As `build`, of what says itself which steps it takes."""
        kept = self._kept(name, title, inputs)
        if kept is None:
            kept = self._made(name, inputs, lambda partial: make(partial, self.display))
        return self.path / name, kept

    def _kept(self, name: str, title: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        kept = finished(self.path / name, step_key(name, inputs))
        if kept is not None:
            self.display.note(f"{title}: unchanged, kept")
        return kept

    def _made(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        with staged(self.path / name, name) as partial:
            facts = make(partial)
            timed = {**facts, "wall_s": round(time.perf_counter() - start, 3)}
            return write_manifest(partial, name, step_key(name, inputs), timed)
