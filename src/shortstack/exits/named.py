"""`EXITS@15`: a depth by the name of a folder of exits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.exits.folder import ExitFolder, is_exits, read_exits
from shortstack.families import family_of
from shortstack.manifest import read_manifest, step_key

DEPTH = re.compile(r"\d{1,6}", re.ASCII)


def split_depth(path: Path) -> tuple[Path, int | None]:
    """`EXITS@15` as (EXITS, 15), where that folder holds exits; any other path with None.

    Raises ShortstackError for a name that means two models: exit 15 of EXITS, and a file or folder
    of that very name, unless this is what `exits export` made of that exit.
    """
    name, at, depth = path.name.rpartition("@")
    folder = path.with_name(name) if at and name else path
    if folder == path or not DEPTH.fullmatch(depth) or not is_exits(folder):
        return path, None
    if not path.exists():
        return folder, int(depth)
    exits = read_exits(folder)
    if int(depth) in exits.depths and not _is_exit(path, exits, int(depth)):
        raise ShortstackError(
            f"{path} is there, and it is also a name of depth {depth} of the exits in {folder}. "
            "Rename one of them."
        )
    return path, None


def exit_key(exits: ExitFolder, exit: int) -> str:
    """Of the folder that `exits export` writes of an exit."""
    return step_key("exit", {"base": exits.base_sha256, "exits": exits.sha256, "exit": exit})


def _is_exit(path: Path, exits: ExitFolder, exit: int) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and manifest.get("key") == exit_key(exits, exit)


def config_at(path: Path) -> dict[str, Any]:
    """config.json of a folder; of `EXITS@15` the base's, with as many layers as run there."""
    folder, depth = split_depth(path)
    if depth is None:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return config
    exits = read_exits(folder)
    config = json.loads((exits.base / "config.json").read_text(encoding="utf-8"))
    nested = family_of(config).nested
    (config[nested] if nested else config)["num_hidden_layers"] = exits.layers_at(depth)
    return config
