"""Output folders: staged, moved into place whole, and able to say how they were made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shortstack import __version__
from shortstack.errors import ShortstackError
from shortstack.folder_lock import alone_in

MANIFEST = "shortstack.json"
SCHEMA = 1


def step_key(step: str, inputs: Mapping[str, Any]) -> str:
    """Hash of what a step is made from; equal key means the step may be skipped."""
    text = json.dumps([SCHEMA, __version__, step, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder we made; None where there is none or it is not ours."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return data if isinstance(data, dict) and data.get("tool") == "shortstack" else None


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The manifest, if the folder holds the finished step `key` with every file as written."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("key") != key:
        return None
    if not all(_unchanged(folder / name, facts) for name, facts in manifest["files"].items()):
        return None
    return manifest


def _unchanged(file: Path, facts: Mapping[str, Any]) -> bool:
    """Size and time as written; where only the time differs (a copied folder), the content."""
    if not file.is_file():
        return False
    now = file.stat()
    if now.st_size != facts["size"]:
        return False
    same_time: bool = now.st_mtime_ns == facts["mtime_ns"]
    return same_time or _sha256(file) == facts["sha256"]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, step: str, key: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `shortstack.json` beside the files it speaks of; returns what was written."""
    files = {
        p.relative_to(folder).as_posix(): {
            "size": p.stat().st_size,
            "mtime_ns": p.stat().st_mtime_ns,
            "sha256": _sha256(p),
        }
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    manifest = {
        "tool": "shortstack",
        "version": __version__,
        "schema": SCHEMA,
        "step": step,
        "key": key,
        "files": files,
        **facts,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: through a temporary name on the same disk."""
    partial = partial_of(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where `write_text` writes first: what a hard kill in its midst leaves."""
    return path.with_name(f".{path.name}.partial")


def check_place(path: Path) -> None:
    """Refuse a file that could not be written, before the work that leads to it; its folder may
    still be missing."""
    above = path.absolute().parent
    while not os.path.exists(above):  # an unreadable folder is none: the one above it tells
        above = above.parent
    if not os.path.isdir(above):
        raise ShortstackError(f"cannot write {path}: {above} is a file. Choose another output.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ShortstackError(
            f"cannot write {path}: nothing can be written in {above}. Choose another output."
        )


def check_ours(folder: Path, step: str) -> None:
    """Refuse a folder that holds anything but what the same step made: it would be replaced.

    `run` works in its folder and replaces only its own steps' folders in it.
    """
    if folder.is_symlink() and not folder.exists():
        raise ShortstackError(f"{folder} is a broken link. Choose another output.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ShortstackError(f"{folder} is a file, not a folder. Choose another output.")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    manifest = read_manifest(folder)
    ours = {MANIFEST, *(manifest or {}).get("files", ())}
    ours |= {partial_of(Path(name)).as_posix() for name in ours}
    if present - {partial_of(Path(MANIFEST)).name} and manifest is None:
        raise ShortstackError(
            f"{folder} exists and was not made by shortstack. Choose another output or empty it."
        )
    if manifest is None:
        return
    if manifest.get("step") != step:
        raise ShortstackError(
            f"{folder} holds the result of another command ({manifest.get('step')}). "
            "Choose another output."
        )
    foreign = sorted(present - ours) if step != "run" else []
    if foreign:
        raise ShortstackError(
            f"{folder} holds {foreign[0]}, which shortstack did not make. "
            "Choose another output or move the file away."
        )


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies in one, or holds one."""
    target = out.resolve()
    for path in (p.resolve() for p in inputs):
        if target == path or target.is_relative_to(path) or path.is_relative_to(target):
            raise ShortstackError(
                f"the output {out} and the input {path} overlap. Choose another output."
            )


@contextlib.contextmanager
def staged(folder: Path, step: str) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; move it into place when the block ends well.

    `step` is the manifest's: only the result of the same step is replaced.

    On any exception, Ctrl-C included, the temporary folder is removed. What an earlier run left
    after a hard kill is removed first. Raises ShortstackError while another one fills it.
    """
    check_ours(folder, step)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    made = _make_parents(folder.parent)
    try:
        with _alone_in_new(partial, folder):
            try:
                yield partial
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            made = []  # and what is at `partial` by now is another one's
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # another step may have put something there
                parent.rmdir()


@contextlib.contextmanager
def _alone_in_new(partial: Path, folder: Path) -> Iterator[None]:
    """Make `partial` an empty folder that no other process uses meanwhile."""
    partial.mkdir(exist_ok=True)
    with alone_in(partial, folder):
        for left in partial.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        yield


def _make_parents(folder: Path) -> list[Path]:
    """Make missing folders; return those made, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
    return missing[::-1]
