"""How good each artifact is: from an evaluation, else from its own verification."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.devices.records import Record
from shortstack.devices.report.merged.cases import Case
from shortstack.errors import ShortstackError, one_line

EVAL_SCHEMA = 1


@dataclass(frozen=True)
class Verdict:
    """A quality figure of one artifact. `higher`: more is better."""

    value: float
    higher: bool
    low: float | None = None
    high: float | None = None

    @property
    def cost(self) -> float:
        """Smaller is better."""
        return -self.value if self.higher else self.value


@dataclass(frozen=True)
class Quality:
    """One yardstick for all: `metric` on `text`. What it does not know has no quality here."""

    metric: str
    text: str
    source: str
    """`evaluation` or `verification`."""
    verdicts: Mapping[str, Verdict]
    """By key, see `keys`."""

    def of(self, case: Case) -> Verdict | None:
        return next((self.verdicts[k] for k in keys(case) if k in self.verdicts), None)


def keys(case: Case) -> list[str]:
    """What an artifact can be found by: its hash; its export, layers and size in an evaluation
    that knows no hash of it and hashed other files of the same folder."""
    artifact = case.measurement.artifact
    spec = artifact.spec
    options = [f"{key}-{value}" for key, value in sorted(spec.options.items())]
    slug = "-".join([spec.format, spec.precision, *options]).lower()
    return [artifact.sha256, f"{slug} {artifact.n_layers} {artifact.size_bytes}"]


def qualities(
    cases: Sequence[Case], records: Sequence[Record], evaluations: Sequence[tuple[str, object]]
) -> Quality | None:
    """The yardstick that knows most of the artifacts; evaluations go before verifications."""
    for found in ([*_evaluated(evaluations)], [*_verified(records)]):
        useful = [q for q in found if any(q.of(case) for case in cases)]
        if useful:
            return max(useful, key=lambda q: len({c.sha256 for c in cases if q.of(c)}))
    return None


def _verified(records: Sequence[Record]) -> Iterator[Quality]:
    """One yardstick a text. Two runtimes of a file differ in rounding: the first one counts."""
    texts = Counter(proof.text for record in records for proof in record.proofs.values())
    for text in texts:
        verdicts: dict[str, Verdict] = {}
        for record in records:
            for (sha256, _), proof in record.proofs.items():
                if proof.text == text and math.isfinite(proof.perplexity):
                    verdicts.setdefault(sha256, Verdict(proof.perplexity, higher=False))
        yield Quality("perplexity", text[:16], "verification", verdicts)


def _evaluated(evaluations: Sequence[tuple[str, object]]) -> Iterator[Quality]:
    """One yardstick a set of an evaluation."""
    for name, data in evaluations:
        if not isinstance(data, Mapping) or data.get("schema") != EVAL_SCHEMA:
            raise ShortstackError(
                f"{name} is no evaluation that this shortstack reads (schema {EVAL_SCHEMA}). "
                "Name the eval.json of shortstack eval."
            )
        try:
            models = {model["label"]: _model_keys(model) for model in data["models"]}
            for spec in data["sets"]:
                yield _of_set(spec, data["results"], models)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShortstackError(
                f"{name} is damaged ({type(error).__name__}: {one_line(str(error), 80)}). "
                "Run shortstack eval again."
            ) from None


def _model_keys(model: Mapping[str, Any]) -> list[str]:
    found = [str(model[name]) for name in ("sha256", "artifact_sha256") if model.get(name)]
    if model.get("export") and model.get("n_layers") is not None:
        found.append(f"{model['export']} {model['n_layers']} {model['size_bytes']}")
    return found


def _of_set(
    spec: Mapping[str, Any], results: Sequence[Mapping[str, Any]], models: Mapping[str, list[str]]
) -> Quality:
    metric = "perplexity" if spec["kind"] == "text" else str(spec["metric"])
    verdicts = {}
    for result in results:
        if result["set"] != spec["name"]:
            continue
        found = result["summary"][metric]
        if None in (found["estimate"], found["low"], found["high"]):  # was NaN or infinite
            continue
        told = Verdict(
            float(found["estimate"]),
            metric != "perplexity",
            float(found["low"]),
            float(found["high"]),
        )
        if math.isfinite(told.value):
            verdicts.update(dict.fromkeys(models[result["model"]], told))
    return Quality(metric.replace("_", " "), str(spec["name"]), "evaluation", verdicts)
