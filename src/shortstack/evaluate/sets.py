"""What a model is evaluated on: sets of rows, from the command line or a YAML file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shortstack.errors import ShortstackError, one_line, unknown
from shortstack.evaluate.codec import Codec
from shortstack.evaluate.scorer import Scorer
from shortstack.progress import OnProgress

KINDS = {
    "choice": "shortstack.evaluate.choice",
    "text": "shortstack.evaluate.perplexity",
    "generation": "shortstack.evaluate.generation",
}
"""Kind of a set -> module with METRICS, `score`, `summarise` and `compare`."""

Row = dict[str, Any]
"""One row's result as plain data: what eval.json keeps."""


@dataclass(frozen=True)
class SetSpec:
    """A set of rows. `limit`: rows (choice, generation) or windows (text), drawn with the seed."""

    name: str
    kind: str
    path: Path
    limit: int | None = None
    metric: str = ""
    window_tokens: int = 512
    """Of a text: tokens a window."""
    max_tokens: int = 32
    """Of a generation: tokens an answer may have."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of set", self.kind, KINDS)
        metrics = self.module.METRICS
        object.__setattr__(self, "metric", self.metric or metrics[0])
        if self.metric not in metrics:
            raise unknown(f"metric of a {self.kind} set", self.metric, metrics)
        least = {"limit": 1, "window_tokens": 2, "max_tokens": 1}
        for field, minimum in least.items():
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < minimum):
                raise ShortstackError(
                    f"set {self.name!r}: {field} must be a whole number of at least {minimum}, "
                    f"got {value!r}."
                )
        if not self.path.is_file():
            raise ShortstackError(f"set {self.name!r}: no file {self.path}. Mend the path.")

    @property
    def module(self) -> Kind:
        module: Any = importlib.import_module(KINDS[self.kind])
        return module  # type: ignore[no-any-return]  # a module is what offers the protocol

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, beside the model: the file's content, not its place."""
        facts = dataclasses.asdict(self)
        del facts["path"]
        return {**facts, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SetSpec:
        return cls(**{**data, "path": Path(data["path"])})


class Kind(Protocol):
    """What the module of a kind offers."""

    METRICS: tuple[str, ...]
    """The first is the default; each is a key of what `summarise` returns."""

    def check(self, path: Path, metric: str) -> None:
        """Raise ShortstackError for a file whose rows are of another kind, or that no answer
        could be right on by this metric."""
        ...

    def score(
        self, scorer: Scorer, codec: Codec, spec: SetSpec, seed: int, progress: OnProgress
    ) -> list[Row]:
        """The model's result for each row."""
        ...

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Counts and metrics over rows; a metric is a dict of estimate, low and high."""
        ...

    def compare(self, original: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
        """The same rows under the original model and under another."""
        ...


def set_of(kind: str, path: Path, **fields: Any) -> SetSpec:
    """A set from the command line, named after its file and folder."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    parent = path.absolute().parent.name
    return SetSpec(f"{parent}-{stem}" if parent else stem, kind, path, **fields)


def listed(
    files: Mapping[str, Sequence[Path] | None],
    sets: Path | None,
    limit: int | None,
    window_tokens: int,
) -> tuple[SetSpec, ...]:
    """The sets of a command line: files by kind, and those of a task set file."""
    named = (
        set_of(kind, path, limit=limit, window_tokens=window_tokens)
        for kind, paths in files.items()
        for path in paths or ()
    )
    return (*named, *(open_sets(sets, limit) if sets else ()))


def open_sets(file: Path, limit: int | None = None) -> tuple[SetSpec, ...]:
    """Read a task set file: YAML, `sets:` a list of `{name, kind, path, limit, metric, …}`.

    Paths are relative to the file; `limit` is for sets that name none. Raises ShortstackError for
    bad YAML, an unknown key or value.
    """
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShortstackError(f"cannot read {file}: {error.strerror}. Name a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ShortstackError(f"{file} is not YAML: {one_line(str(error), 200)}") from None
    found = data.get("sets") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(s, dict) for s in found):
        raise ShortstackError(f"{file}: give `sets:`, a list of mappings with name, kind and path.")
    return tuple(_parsed(file, {"limit": limit, **entry}) for entry in found)


def _parsed(file: Path, entry: Mapping[str, Any]) -> SetSpec:
    known = [field.name for field in dataclasses.fields(SetSpec)]
    for key in entry:
        if key not in known:
            raise ShortstackError(f"{file}: {unknown('key', str(key), known)}")
    for key in ("kind", "path"):
        if not isinstance(entry.get(key), str):
            raise ShortstackError(f"{file}: a set has no text {key!r}. Add it.")
    fields = {key: value for key, value in entry.items() if key not in ("kind", "path", "name")}
    found = set_of(entry["kind"], file.parent / entry["path"], **fields)
    return dataclasses.replace(found, name=str(entry.get("name", found.name)))


def distinct(sets: Sequence[SetSpec]) -> tuple[SetSpec, ...]:
    """The sets, refused if there is none or two have one name."""
    if not sets:
        raise ShortstackError(
            "nothing to evaluate on. Give --choice, --text, --generate or --sets."
        )
    names = [spec.name for spec in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ShortstackError(f"two sets are named {twice[0]!r}. Give names in a --sets file.")
    bad = [name for name in names if not name or "/" in name or name.startswith(".")]
    if bad:
        raise ShortstackError(f"a set cannot be named {bad[0]!r}: results lie in a folder of it.")
    return tuple(sets)
