"""`EXITS@15`: an exit of a folder with exits -> an ordinary folder of k + 1 layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.exits import ExitFolder, read_exits, split_depth
from shortstack.intake import Preview
from shortstack.manifest import finished, staged, step_key, write_manifest
from shortstack.progress import OnProgress


def identify(target: str) -> dict[str, Any]:
    """The hashes of base and exits, and which exit."""
    exits, exit = _parts(target)
    return {"base": exits.base_sha256, "exits": exits.sha256, "init": exits.init, "exit": exit}


def open_source(
    target: str, identity: dict[str, Any], work: Path, progress: OnProgress
) -> Checkpoint:
    key = step_key("intake", identity)
    if finished(work, key) is None:
        from shortstack.prune.exits.cut import write_exit

        exits, exit = _parts(target)
        base = exits.open_base()
        with disk_errors(work), staged(work, "intake") as out:
            write_exit(base, exits, exit, out, progress=progress)
            write_manifest(out, "intake", key, {"source": identity})
    return Checkpoint.open(work)


def preview(target: str) -> Preview | None:
    from shortstack.prune.exits.cut import exit_cut

    exits, exit = _parts(target)
    base = exits.open_base()
    made = exit_cut(base, exits, exit).checkpoint(base, exits, exit)
    return Preview(made, made.n_bytes)


def _parts(target: str) -> tuple[ExitFolder, int]:
    folder, exit = split_depth(Path(target))
    assert exit is not None  # what `resolve` looked at
    return read_exits(folder), exit
