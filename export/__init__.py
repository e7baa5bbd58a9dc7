"""Export: a checkpoint becomes one artifact that a runtime opens. One file, one table line each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import unknown
from shortstack.progress import OnProgress, silent

EXPORTERS: dict[str, str] = {
    "gguf": "shortstack.export.to_gguf",
    "onnx": "shortstack.export.to_onnx",
    "packed": "shortstack.export.to_packed",
}
"""Format -> module with `PRECISIONS` and what `Exporter` names."""


class Exporter(Protocol):
    """What a module in EXPORTERS offers.

    `REVISION` is one more where the same spec gives other weights than before: a finished export
    of an earlier one is made again.
    """

    REVISION: int

    def check(self, checkpoint: Checkpoint, spec: ExportSpec) -> None:
        """Raise ShortstackError for a spec it cannot realise exactly; costs nothing."""

    def predict(self, checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, int]:
        """`size_bytes`; `peak_ram_bytes`, anonymous memory of all processes, with PROCESS_BYTES for
        the one that asks; `disk_bytes` (at once, intermediate files too). `writing_ram_bytes` is
        the peak behind the calibration, where an exporter tells the two apart."""
        ...

    def context_tokens(self, checkpoint: Checkpoint, spec: ExportSpec) -> int | None:
        """Up to how many tokens the artifact computes what the checkpoint does; None: no limit."""
        ...

    def calibrates(self, checkpoint: Checkpoint, spec: ExportSpec) -> bool:
        """Whether `export` makes use of calibration text."""
        ...

    def export(
        self,
        checkpoint: Checkpoint,
        spec: ExportSpec,
        out: Path,
        *,
        calibration: Sequence[Sequence[int]] = (),
        progress: OnProgress = silent,
    ) -> Artifact:
        """Write into the existing folder `out`, which the caller stages and moves.

        `calibration`: token windows of one length, for importance and activation ranges.
        """
        ...


def exporter(name: str) -> Exporter:
    """The exporter of a format. Raises ShortstackError for one that no table line has."""
    try:
        module = EXPORTERS[name]
    except KeyError:
        raise unknown("export format", name, EXPORTERS) from None
    return cast(Exporter, importlib.import_module(module))
