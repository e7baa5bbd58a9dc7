"""Score one model on one set: a checkpoint here, an artifact in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from shortstack import child
from shortstack.errors import ShortstackError
from shortstack.evaluate import agreement, perplexity
from shortstack.evaluate.codec import Codec
from shortstack.evaluate.scorer import Scorer
from shortstack.evaluate.sets import Row, SetSpec
from shortstack.evaluate.targets import PYTORCH, Loading, Target
from shortstack.progress import OnProgress

PATIENCE_S = 7 * 86400.0
"""A child that hangs is ended after this; a large set on a small machine takes days."""


class Examinee:
    """A model under evaluation. A checkpoint is opened at the first need and kept till `close`;
    an artifact's runtime may crash, so that each of its sets has a process of its own."""

    def __init__(self, target: Target, loading: Loading, seed: int) -> None:
        self.target = target
        self._loading = loading
        self._seed = seed
        self._scorer: Scorer | None = None
        self._codec: Codec | None = None

    def score(self, spec: SetSpec, progress: OnProgress) -> dict[str, Any]:
        """`rows`, `info` of the runtime, `score_s`. Raises ShortstackError for a model that gives
        no numbers."""
        if self._here:
            found = _score(*self._opened(), spec, self._seed, progress)
        else:
            found = self._in_child("score_here", spec, {}, progress)
        _check_finite(self.target, spec, found["rows"])
        return found

    def agree(self, spec: SetSpec, reference: Path, progress: OnProgress) -> list[Row]:
        """KL and top-1 agreement with what `write_reference` wrote, a row a window."""
        if self._here:
            scorer, codec = self._opened()
            windows = _windows(scorer, codec, spec, self._seed)
            return agreement.agreement(scorer, windows, reference, progress)
        given = {"reference": str(reference)}
        rows: list[Row] = self._in_child("agree_here", spec, given, progress)["rows"]
        return rows

    def write_reference(self, spec: SetSpec, file: Path, progress: OnProgress) -> None:
        """Keep the distributions over the first windows of a text."""
        if self._here:
            scorer, codec = self._opened()
            windows = _windows(scorer, codec, spec, self._seed)
            agreement.write_reference(scorer, windows, file, progress)
        else:
            self._in_child("reference_here", spec, {"reference": str(file)}, progress)

    @property
    def _here(self) -> bool:
        return self.target.runtime == PYTORCH

    def _opened(self) -> tuple[Scorer, Codec]:
        if self._scorer is None or self._codec is None:
            self._codec = self.target.codec()
            self._scorer = self.target.open(self._loading)
        return self._scorer, self._codec

    def _in_child(
        self, function: str, spec: SetSpec, more: dict[str, str], progress: OnProgress
    ) -> dict[str, Any]:
        request = {
            "target": self.target.to_dict(),
            "loading": dataclasses.asdict(self._loading),
            "spec": spec.to_dict(),
            "seed": self._seed,
            **more,
        }
        return child.call(
            f"shortstack.evaluate.run:{function}",
            request,
            timeout_s=PATIENCE_S,
            what=f"{self.target.label} in {self.target.runtime}, on {spec.name},",
            progress=progress,
        )

    def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def score_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: score an artifact on a set."""
    target, loading, spec = _asked(request)
    codec = target.codec()
    with target.open(loading) as scorer:
        return _score(scorer, codec, spec, request["seed"], child.report_progress)


def agree_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: hold an artifact against a reference."""
    target, loading, spec = _asked(request)
    codec = target.codec()
    with target.open(loading) as scorer:
        windows = _windows(scorer, codec, spec, request["seed"])
        file = Path(request["reference"])
        return {"rows": agreement.agreement(scorer, windows, file, child.report_progress)}


def reference_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: write an artifact's distributions, for others to be held against."""
    target, loading, spec = _asked(request)
    codec = target.codec()
    with target.open(loading) as scorer:
        windows = _windows(scorer, codec, spec, request["seed"])
        file = Path(request["reference"])
        agreement.write_reference(scorer, windows, file, child.report_progress)
    return {}


def _asked(request: dict[str, Any]) -> tuple[Target, Loading, SetSpec]:
    return (
        Target.from_dict(request["target"]),
        Loading(**request["loading"]),
        SetSpec.from_dict(request["spec"]),
    )


def _score(
    scorer: Scorer, codec: Codec, spec: SetSpec, seed: int, progress: OnProgress
) -> dict[str, Any]:
    start = time.perf_counter()
    rows = spec.module.score(scorer, codec, spec, seed, progress)
    return {"rows": rows, "info": scorer.info, "score_s": time.perf_counter() - start}


def _windows(scorer: Scorer, codec: Codec, spec: SetSpec, seed: int) -> list[list[int]]:
    return perplexity.windows_of(scorer, codec, spec, seed)[: agreement.WINDOWS]


def _check_finite(target: Target, spec: SetSpec, rows: Sequence[Row]) -> None:
    for row in rows:
        nats = row.get("nats", 0.0)
        if not all(map(math.isfinite, nats if isinstance(nats, list) else [nats])):
            raise ShortstackError(
                f"{target.label} gives no numbers (NaN or infinite) on {spec.name}. Try another "
                "--dtype, or look at the model's weights."
            )
