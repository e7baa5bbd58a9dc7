"""The model in: a folder, a .gguf file, a file inside a package, a hub id, an exit of a model."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.exits import is_exits, read_exits, split_depth
from shortstack.progress import OnProgress, silent

SOURCES = {
    "folder": "shortstack.intake.folder",
    "gguf": "shortstack.intake.gguf_file",
    "hub": "shortstack.intake.hub",
    "packed": "shortstack.intake.packed_file",
    "exit": "shortstack.intake.exit_of",
}
"""Kind of source -> module that offers what `Source` says."""


@dataclass(frozen=True)
class Preview:
    """A checkpoint that can be asked for names, types and shapes, but may not lie on disk yet."""

    checkpoint: Checkpoint
    materialised_bytes: int = 0
    """What opening it will write."""


class Source(Protocol):
    """What a module named in SOURCES offers."""

    def identify(self, target: str) -> dict[str, Any]:
        """What the model is made from, cheap to learn: equal facts, equal model."""
        ...

    def open_source(
        self, target: str, identity: dict[str, Any], work: Path, progress: OnProgress
    ) -> Checkpoint:
        """Open the model, materialised in `work` if it is not a folder already."""
        ...

    def preview(self, target: str) -> Preview | None:
        """The checkpoint as headers, without writing; None where that takes a download."""
        ...


def open_model(reference: str, work: Path, *, progress: OnProgress = silent) -> Checkpoint:
    """Open a model by folder, .gguf file, `pkg:PACKAGE/PATH`, `hf:OWNER/NAME[@REVISION]`, or
    `EXITS@15`, an exit of a folder with exits.

    A folder is opened in place; anything else becomes a folder at `work`, once. Only `hf:` uses
    the network. Raises ShortstackError for a reference that names nothing.
    """
    kind, target = resolve(reference)
    source = _source(kind)
    return source.open_source(target, source.identify(target), work, progress)


def describe_model(reference: str) -> dict[str, Any]:
    """What `reference` stands for, to compute a step key from: kind and content hash or revision.

    Reads the file or folder once; uses no network.
    """
    kind, target = resolve(reference)
    return {"kind": kind, **_source(kind).identify(target)}


def preview_model(reference: str) -> Preview | None:
    """What `open_model` would give, from headers alone; None for a hub model."""
    kind, target = resolve(reference)
    return _source(kind).preview(target)


def resolve(reference: str) -> tuple[str, str]:
    """Split a reference into a kind of SOURCES and what that source opens."""
    scheme, colon, rest = reference.partition(":")
    if colon and scheme == "hf":
        return "hub", rest
    path = package_file(rest) if colon and scheme == "pkg" else Path(reference).expanduser()
    depth = split_depth(path)[1]
    if path.is_dir():
        _check_model(path)
        return "folder", str(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return "gguf", str(path)
    if depth is not None:
        return "exit", str(path)
    if path.is_file() and is_packed(path):
        return "packed", str(path)
    if path.is_file():
        raise ShortstackError(
            f"{path} is neither a .gguf file nor a model folder. "
            "Name the folder that holds config.json, a .gguf file, or a packed file."
        )
    is_file = path.suffix.lower() == ".gguf"
    if not is_file and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", reference):
        raise ShortstackError(
            f"there is no folder {reference!r} here. To download it from the Hugging Face hub "
            f"say: hf:{reference}"
        )
    raise ShortstackError(f"there is no file or folder {str(path)!r}. Check the model's path.")


def _check_model(folder: Path) -> None:
    if is_exits(folder) and not (folder / "config.json").is_file():
        exits = read_exits(folder).exits
        raise ShortstackError(
            f"{folder} holds exits of a model, behind {', '.join(map(str, exits))} layers. "
            f"Name one: {folder}@{exits[0]}"
        )


def model_paths(reference: str) -> tuple[Path, ...]:
    """The file or folder that a reference names here; none for a hub model."""
    kind, target = resolve(reference)
    if kind == "exit":
        found = read_exits(split_depth(Path(target))[0])
        return (found.path, found.base)
    return () if kind == "hub" else (Path(target),)


def package_file(target: str) -> Path:
    """Find `PACKAGE/PATH` inside an installed package, without importing the package."""
    package, _, inside = target.partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ShortstackError(
            f"package {package!r} is not installed. Run: pip install {package.replace('_', '-')}"
        )
    for folder in spec.submodule_search_locations:
        root = Path(folder).resolve()
        path = (root / inside).resolve()
        if not path.is_relative_to(root):
            raise ShortstackError(
                f"pkg:{target} leads out of the package. Name a path inside {package!r}."
            )
        if path.exists():
            return path
    raise ShortstackError(f"package {package!r} has no {inside!r}. Check the path after the slash.")


def is_packed(path: Path) -> bool:
    """A packed file, or a variant of a catalogue (packed/catalogue.py)."""
    if path.suffix == ".json":
        return (path.parent / "catalogue.json").is_file() and path.name != "catalogue.json"
    if path.suffix.lower() != ".safetensors":
        return False
    from shortstack.packed.file import PackedFile

    return PackedFile.looks_like(path)


def _source(kind: str) -> Source:
    return cast(Source, importlib.import_module(SOURCES[kind]))
