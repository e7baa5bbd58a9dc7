"""An exported model: what it is, where it came from, how many bytes a token reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shortstack.errors import ShortstackError

Format = Literal["gguf", "onnx", "packed"]
ONE_PRECISION = {"packed": "lossless"}
"""Formats of one precision, which need not be named."""


@dataclass(frozen=True)
class ExportSpec:
    """What to write: `gguf:Q4_K_M`, `onnx:int4`; `options` are the exporter's own (head type …)."""

    format: str
    precision: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, **options: str) -> ExportSpec:
        """Read `FORMAT:PRECISION`, or a format of ONE_PRECISION, as the command line has it."""
        if text in ONE_PRECISION:
            text = f"{text}:{ONE_PRECISION[text]}"
        fmt, colon, precision = text.partition(":")
        if not (fmt and colon and precision):
            raise ShortstackError(f"export target {text!r} is not FORMAT:PRECISION, e.g. gguf:Q8_0")
        return cls(fmt, precision, tuple(sorted(options.items())))

    def option(self, name: str, default: str | None = None) -> str | None:
        return dict(self.options).get(name, default)

    @property
    def slug(self) -> str:
        """A name for folders and tables: `gguf-q4_0`, `gguf-q4_0-head-q6_k`."""
        parts = [self.format, self.precision, *(f"{k}-{v}" for k, v in self.options)]
        return "-".join(parts).lower()


@dataclass(frozen=True)
class Artifact:
    """One exported model. `path` is the file (GGUF) or the folder (ONNX)."""

    path: Path
    spec: ExportSpec
    n_layers: int
    n_params: int
    size_bytes: int
    weight_bytes_per_token: int
    """Weight bytes that decoding one token reads: every layer and the head once, an embedding
    table that is only gathered from not at all."""
    sha256: str
    source_sha256: str
    notes: tuple[str, ...] = ()
    least_runtime: str | None = None
    """The oldest runtime known to read the artifact right, where not any recent one does."""
    matmul_params: int | None = None
    """Parameters that are multiplied with each token, the head's apart (shortstack.multiplied).
    None where that is not known."""
    head_params: int | None = None

    @property
    def format(self) -> str:
        return self.spec.format

    def to_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """Plain data; `path` is stored relative to `folder` (default: the one it lies in), so
        that folders can be moved and a staged artifact is found where it is moved to."""
        data = dataclasses.asdict(self)
        data["path"] = self.path.relative_to(folder or self.path.parent).as_posix()
        data["spec"]["options"] = dict(self.spec.options)
        data["notes"] = list(self.notes)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], folder: Path) -> Artifact:
        """Read what `to_dict` wrote for the same folder."""
        spec = ExportSpec(
            data["spec"]["format"],
            data["spec"]["precision"],
            tuple(sorted(data["spec"]["options"].items())),
        )
        fields = {k: v for k, v in data.items() if k not in ("path", "spec", "notes")}
        return cls(path=folder / data["path"], spec=spec, notes=tuple(data["notes"]), **fields)
