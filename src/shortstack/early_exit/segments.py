"""A decoder as a row of ONNX graphs: what `segments.json` beside them says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

SEGMENTS = "segments.json"
SCHEMA = 1


@dataclass(frozen=True)
class Segment:
    """One graph. `end`: layers that have been run behind it; `crossing`: what it hands to the next
    one; `hidden`: of these, whose sum is the hidden state. The last one gives logits."""

    file: str
    end: int
    inputs: tuple[str, ...]
    crossing: tuple[str, ...]
    hidden: tuple[str, ...]


@dataclass(frozen=True)
class Segments:
    segments: tuple[Segment, ...]
    n_layers: int
    source_sha256: str
    """Of the checkpoint that the graphs were exported from."""

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(segment.end for segment in self.segments[:-1])

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Segments:
        parts = [
            Segment(
                part["file"],
                part["end"],
                *(tuple(part[key]) for key in ("inputs", "crossing", "hidden")),
            )
            for part in data["segments"]
        ]
        return cls(tuple(parts), data["n_layers"], data["source_sha256"])


def read_segments(folder: Path) -> Segments:
    """Raises ShortstackError for a folder without them, and for another schema."""
    try:
        data = json.loads((folder / SEGMENTS).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ShortstackError(
                f"{folder / SEGMENTS} is of schema {data['schema']!r}, this shortstack reads "
                f"{SCHEMA}. Split the export again."
            )
        return Segments.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError):
        raise ShortstackError(
            f"{folder} holds no {SEGMENTS} that can be read. Split an ONNX export with: "
            "shortstack exits split EXPORT --early-exit FILE -o OUT"
        ) from None
