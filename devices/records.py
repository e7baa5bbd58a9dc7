"""Read records back, from any machine: checked field by field, refused in one line each."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError as Invalid

from shortstack.devices.measurement import SCHEMA
from shortstack.devices.record_fields import BenchRecord, MeasurementRecord, RunRecord
from shortstack.devices.visible import visible
from shortstack.errors import ShortstackError, one_line

RUN_SCHEMA = 1
"""Of report.json of `shortstack run`."""
NAMES = ("bench.json", "report.json")
DEEPER, MOST_FOLDERS = 2, 1000
"""How many levels below those that are read, and how many folders of each, an error looks at to
say where records are: a home folder given by mistake must not be walked."""


@dataclass(frozen=True)
class Proof:
    """What is known of an artifact's quality: perplexity of the file in its runtime."""

    perplexity: float
    text: str
    """Which text: a hash, or what it was called. Perplexities of two texts are no pair."""


@dataclass(frozen=True)
class Record:
    """One run on one machine, whichever command wrote it."""

    run_id: str
    file: Path
    kind: str
    tool_version: str
    started_at: str | None
    command: str | None
    host: Mapping[str, Any]
    measurements: tuple[MeasurementRecord, ...]
    ceilings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    proofs: Mapping[tuple[str, str], Proof] = field(default_factory=dict)
    """By (sha256 of the artifact, runtime)."""
    unmade: tuple[tuple[str, str], ...] = ()
    """What there was nothing to measure of: (what, why)."""
    told_again: tuple[Path, ...] = ()
    """Other files that hold the same run."""


def load_records(paths: Sequence[Path]) -> list[Record]:
    """Read files and folders of records; folders are searched one level deep.

    Raises ShortstackError, naming the file, for a newer schema, text that is no JSON, another kind
    of file, a field that is missing or wrong, and one run id with two contents. A run that is
    found twice is told once.
    """
    found: dict[str, tuple[str, Record]] = {}
    for file in [file for path in paths for file in record_files(path)]:
        digest, record = _load(file)
        known = found.get(record.run_id)
        if known is None:
            found[record.run_id] = digest, record
            continue
        if known[0] != digest:
            raise ShortstackError(
                f"{file} and {known[1].file} have the run id {record.run_id} and other content. "
                "One was edited: remove it, or measure again."
            )
        again = (*known[1].told_again, file)
        found[record.run_id] = digest, _replaced(known[1], again)
    return [record for _, record in found.values()]


def record_files(path: Path) -> list[Path]:
    """The records that lie at a path: the file itself, those of the folder, or one level below."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ShortstackError(f"there is no {path}. Name a file or folder of shortstack bench.")
    here = [path / name for name in NAMES if (path / name).is_file()]
    folders = _folders_in(path)
    found = here or [f / name for f in folders for name in NAMES if (f / name).is_file()]
    if not found:
        raise ShortstackError(
            f"{path} and the folders in it hold no {' and no '.join(NAMES)}; deeper folders are "
            f"not searched. {_next_step(folders)}"
        )
    return found


def _next_step(folders: Sequence[Path]) -> str:
    """Where the nearest record lies below `folders`, which hold none; else how to make one."""
    level = list(folders)
    for _ in range(DEEPER):
        inside = (below for folder in level for below in _folders_in(folder))
        level = list(itertools.islice(inside, MOST_FOLDERS))
        for folder in level:
            if any((folder / name).is_file() for name in NAMES):
                return f"The nearest is {folder}: name it, or all of {folder.parent}"
    return "Run: shortstack bench MODEL -o DIR"


def _folders_in(path: Path) -> list[Path]:
    """By name, but hidden ones; none of a folder that is closed to us."""
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def _replaced(record: Record, again: tuple[Path, ...]) -> Record:
    return Record(**{**vars(record), "told_again": again})


def _load(file: Path) -> tuple[str, Record]:
    """The record, and a hash of its content."""
    data = read_json(file)
    if not isinstance(data, dict):
        raise ShortstackError(f"{file} is no record of shortstack: it holds no object.")
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    if "kind" not in data and "entries" in data:
        return digest, _of_run(file, data, digest[:32])
    if data.get("kind") != "bench":
        kind = one_line(repr(data.get("kind")), 40)
        raise ShortstackError(
            f"{file} is no record of shortstack bench or run (kind {kind}). Name its bench.json."
        )
    _check_schema(file, data.get("schema"), SCHEMA)
    return digest, _of_bench(file, _checked(file, BenchRecord, data))


def read_json(file: Path) -> Any:
    """The content, its control characters written out: no text of it moves a terminal's cursor
    or turns the direction of a table. Raises ShortstackError, naming the file, for what is no
    whole JSON."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(data, ensure_ascii=False).encode()  # halves of a character cannot be written
        return visible(data)
    except json.JSONDecodeError as error:
        raise ShortstackError(
            f"{file} is no whole JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "It may be cut short: copy it again, or measure again."
        ) from None
    except (ValueError, RecursionError) as error:  # other text than UTF-8, endless digits or nests
        raise ShortstackError(
            f"{file} is no record: {one_line(str(error), 80)}. Copy it again, or measure again."
        ) from None


def _no_number(name: str) -> None:
    """NaN and Infinity, which JSON does not have: as good as missing."""


def _check_schema(file: Path, schema: Any, known: int) -> None:
    if schema == known and not isinstance(schema, bool):
        return
    newer = isinstance(schema, int) and schema > known
    raise ShortstackError(
        f"{file} has schema {one_line(repr(schema), 40)}, this shortstack reads {known}. "
        + ("Update shortstack." if newer else "Measure again.")
    )


def _checked(file: Path, model: type[Any], data: Any, where: str = "") -> Any:
    try:
        return model.model_validate(data)
    except Invalid as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = where + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        )
        raise ShortstackError(
            f"{file} is damaged: {one_line(place.lstrip('.'), 120)}: "
            f"{one_line(first['msg'], 120)}. Copy it again, or measure again."
        ) from None


def _of_bench(file: Path, bench: BenchRecord) -> Record:
    return Record(
        run_id=bench.run_id,
        file=file,
        kind=bench.kind,
        tool_version=bench.tool_version,
        started_at=bench.started_at,
        command=bench.command,
        host=bench.host,
        measurements=tuple(bench.measurements),
        ceilings={device: found.model_dump() for device, found in bench.ceilings.items()},
    )


def _of_run(file: Path, data: Mapping[str, Any], run_id: str) -> Record:
    """report.json of `shortstack run`: no run id of its own, so its content's hash."""
    _check_schema(file, data.get("schema"), RUN_SCHEMA)
    run = _checked(file, RunRecord, data)
    quality = run.quality or {}
    text = str(quality.get("text_sha256") or quality.get("text_source") or f"of run {run_id}")
    proofs = {}
    for entry in run.entries:
        perplexity = (entry.verification or {}).get("perplexity")
        if entry.measurement is not None and isinstance(perplexity, int | float):
            key = entry.measurement.artifact.sha256, entry.runtime
            proofs[key] = Proof(float(perplexity), text)
    return Record(
        run_id=run_id,
        file=file,
        kind="run",
        tool_version=run.tool_version,
        started_at=run.created_at,
        command=run.command,
        host=run.host,
        measurements=tuple(e.measurement for e in run.entries if e.measurement),
        proofs=proofs,
        unmade=tuple(
            (f"{e.spec}, {e.runtime}, {e.label}", e.failure) for e in run.entries if e.failure
        ),
    )
