"""`shortstack report DIR... -o OUT`: read records and evaluations, write the merged report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.devices.records import load_records, read_json
from shortstack.devices.report.merged import merge, write_merged
from shortstack.errors import ShortstackError
from shortstack.manifest import check_apart, staged, step_key, write_manifest
from shortstack.roofline_report import projections, shares


def is_one_run(folders: Sequence[Path], out: Path | None) -> bool:
    """Whether the report of one `shortstack run` is meant, not a merged one.

    A folder that holds no record at all is that case too: its message says what to run.
    """
    if len(folders) != 1 or (folders[0] / "bench.json").is_file():
        return False
    return (folders[0] / "report.json").is_file() or (out is None and not folders[0].is_file())


def merge_reports(
    paths: Sequence[Path],
    evaluations: Sequence[Path],
    out: Path | None,
    project: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the merged report of all records at `paths` into the folder `out`.

    `project`: ids of catalogue devices (docs/roofline.md). Raises ShortstackError for a record, an
    evaluation or an id that cannot be read, before anything is written.
    """
    if out is None:
        raise ShortstackError("merging records needs a folder for the result. Add: -o OUT")
    check_apart(out, [*paths, *evaluations])
    records = load_records(paths)
    judged = [(str(file), read_json(file)) for file in map(_eval_file, evaluations)]
    merged = merge(records, judged, projections(records, project), shares)
    with staged(out, "report") as partial:
        written = write_merged(merged, partial)
        key = step_key("report", {"runs": [record.run_id for record in records]})
        write_manifest(partial, "report", key, {"runs": [r.run_id for r in records]})
    return {
        "report": str(out / "report.html"),
        "files": [path.name for path in written],
        "runs": len(records),
        "machines": [machine.name for machine in merged.machines],
        "measurements": len(merged.cases),
        "told_once": sum(len(record.told_again) for record in records),
    }


def _eval_file(path: Path) -> Path:
    file = path / "eval.json" if path.is_dir() else path
    if not file.is_file():
        raise ShortstackError(f"there is no {file}. Run: shortstack eval MODEL -o DIR")
    return file
