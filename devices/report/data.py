"""What a report is made of. `report.json` holds all of it; HTML and Markdown only show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack import __version__
from shortstack.devices.measurement import Measurement
from shortstack.errors import ShortstackError

SCHEMA = 1
ORIGINAL, PRUNED = "original", "pruned"


@dataclass(frozen=True)
class ModelFacts:
    """A checkpoint as it came in, or as it left the cut. `source`: what the user named."""

    name: str
    source: str
    sha256: str
    n_layers: int
    n_params: int
    n_bytes: int | None = None


@dataclass(frozen=True)
class Quality:
    """Perplexity of both models in PyTorch on text that no earlier step has seen."""

    original_perplexity: float
    pruned_perplexity: float
    n_tokens: int
    text_source: str
    text_sha256: str | None = None

    @property
    def ratio(self) -> float:
        """Above one: the pruned model is worse."""
        return self.pruned_perplexity / self.original_perplexity


@dataclass(frozen=True)
class Entry:
    """One artifact in one runtime: what it is, what was proven, what was measured.

    `verification` has the keys mean_kl_prefill, mean_kl_decode, top1_agreement (0 to 1),
    perplexity, reference_perplexity, perplexity_ratio, n_tokens, tokenizer_equal and runtime;
    one that is missing is shown as not known. `bounds` has the limits of the keys that have one,
    e.g. {"mean_kl_prefill": 1e-4}. `failure` says why there is no artifact.
    """

    label: str
    spec: str
    runtime: str
    artifact: Mapping[str, Any] | None = None
    verification: Mapping[str, Any] | None = None
    bounds: Mapping[str, Any] | None = None
    measurement: Measurement | None = None
    failure: str | None = None

    @property
    def group(self) -> tuple[str, str]:
        return self.spec, self.runtime

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        measured = data["measurement"]
        return cls(**{**data, "measurement": Measurement.from_dict(measured) if measured else None})


@dataclass(frozen=True)
class ReportData:
    """Everything a reader may ask for."""

    model: ModelFacts
    entries: tuple[Entry, ...]
    pruned: ModelFacts | None = None
    plan: Mapping[str, Any] | None = None
    """`n_layers`, `drop`, `method`, `scores` (one a layer or none, higher means keep), `facts`."""
    quality: Quality | None = None
    exits: Mapping[str, Any] | None = None
    """`init`, `tokens`, `steps`, `best_step` and `depths`, the whole model last: `depth`, `layers`,
    `kl`, `perplexity`, `same_token` on selection text, `unseen_perplexity` on the test part."""
    early_exit: Sequence[Mapping[str, Any]] | None = None
    """One a test set, as in early_exit.json without the answers."""
    host: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    command: str | None = None
    created_at: str | None = None
    """UTC, ISO 8601; None leaves it out, so that equal data give equal files."""
    tool_version: str = __version__
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(dataclasses.replace(self, entries=()))
        data["entries"] = [_entry_dict(entry) for entry in self.entries]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReportData:
        """Read what `to_dict` wrote. Raises ShortstackError for another schema or damage."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ShortstackError(
                f"this report has schema {_schema(data)!r}, this shortstack reads {SCHEMA}. "
                "Update shortstack, or run it again."
            )
        try:
            rest = {k: v for k, v in data.items() if k != "comparisons"}
            rest["model"] = ModelFacts(**data["model"])
            rest["pruned"] = ModelFacts(**data["pruned"]) if data["pruned"] else None
            rest["quality"] = Quality(**data["quality"]) if data["quality"] else None
            rest["entries"] = tuple(Entry.from_dict(entry) for entry in data["entries"])
            return cls(**rest)
        except (KeyError, TypeError) as error:
            raise ShortstackError(f"this report is damaged: {error}. Run it again.") from None


def _schema(data: Any) -> Any:
    return data.get("schema") if isinstance(data, Mapping) else None


def _entry_dict(entry: Entry) -> dict[str, Any]:
    data = dataclasses.asdict(dataclasses.replace(entry, measurement=None))
    data["measurement"] = entry.measurement.to_dict() if entry.measurement else None
    return data
