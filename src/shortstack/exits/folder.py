"""A folder of exits: what was trained beside a model, and which model that is.

exits.json          schema, the base model's SHA-256 and place, exits, how they began, what training
                    saw and gave, the SHA-256 of the tensors' file
exits.safetensors   exits.15.layer.self_attn.q_proj.weight, ..., exits.15.norm.weight

Exit k stands behind the first k layers of the base: one decoder layer of its own (none where `init`
is norm-only or none), a norm, then the base's head. The base's tensors are not stored again. Both
files may also lie in the base's own folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.checkpoint import DTYPE_BYTES, EXITS_FILE, Checkpoint, TensorInfo, hash_file
from shortstack.errors import ShortstackError, one_line, unknown
from shortstack.families import TensorRule

SCHEMA = 1
FACTS = "exits.json"
TENSORS = EXITS_FILE
INITS = ("last", "random", "norm-only", "none")
"""How exits begin: a copy of the last layer, random weights, or no layer at all; `none` is the
logit lens, of which nothing is trained."""
WITH_LAYER = frozenset({"last", "random"})
LONGEST_PATH = 4096
"""Characters of the base's path, as long as any system's."""


@dataclass(frozen=True)
class ExitFolder:
    """A set of exits on disk. Its tensors agree with the checksum; nothing is loaded."""

    path: Path
    base: Path
    base_sha256: str
    n_layers: int
    exits: tuple[int, ...]
    init: str
    sha256: str
    facts: Mapping[str, Any]
    """What training saw and gave: tokens, losses, settings."""
    place: str = ""
    """Where the base was, from `path`, as exits.json says; empty where it was named anew."""

    @property
    def has_layers(self) -> bool:
        return self.init in WITH_LAYER

    @property
    def depths(self) -> tuple[int, ...]:
        """What a request may ask for: every exit, and the whole model last."""
        return (*self.exits, self.n_layers)

    def layers_at(self, depth: int) -> int:
        """Layers that run at a depth: k and the exit's own. Raises ShortstackError for another."""
        self.check_depth(depth)
        return depth + int(self.has_layers and depth != self.n_layers)

    def check_depth(self, depth: int) -> None:
        if depth not in self.depths:
            raise ShortstackError(
                f"{self.path} has no depth {depth}. It has {_listed(self.exits)}, and "
                f"{self.n_layers}, the whole model."
            )

    def check_exit(self, exit: int) -> None:
        if exit not in self.exits:
            raise ShortstackError(
                f"{self.path} has no exit behind {exit} layers. It has {_listed(self.exits)}."
            )

    def open_base(self) -> Checkpoint:
        """The model that the exits stand on. Raises ShortstackError where it is another one, and
        where its shapes and the exits' differ."""
        if not (self.base / "config.json").is_file():
            raise ShortstackError(self._without_base())
        base = Checkpoint.open(self.base)
        if base.sha256 != self.base_sha256:
            raise ShortstackError(
                f"{self.path} was made for another model than {self.base}: its hash is "
                f"{self.base_sha256[:12]}, that of the folder {base.sha256[:12]}. "
                "Put the right one there, or name it with --model of exits choose or exits export."
            )
        self._check_tensors(base)
        return base

    def _without_base(self) -> str:
        if not self.place:
            return f"{self.base} holds no model, which {self.path} needs. Name its folder."
        return (
            f"{self.path} belongs to a model that lay at {self.place} from there: at {self.base} "
            "there is none. If the exits or the model were moved, move the other along, or put the "
            f"model (or a link to it; its hash is {self.base_sha256[:12]}) there, or name its "
            "folder with --model of exits choose or exits export."
        )

    def names(self, base: Checkpoint, exit: int) -> Iterator[tuple[str, TensorRule]]:
        """(name in the file, rule of the family) of every tensor of an exit, the norm last."""
        if self.has_layers:
            for rule in layer_rules(base):
                yield f"exits.{exit}.layer.{rule.hf}", rule
        yield f"exits.{exit}.norm.weight", norm_rule(base)

    def load(self, exit: int) -> dict[str, Any]:
        """Tensors of an exit in torch, as stored: `norm.weight`, and `layer.` with the names
        inside a layer."""
        from safetensors import safe_open

        self.check_exit(exit)
        prefix = f"exits.{exit}."
        with safe_open(self.path / TENSORS, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): stored.get_tensor(name) for name in names}

    @property
    def dtype(self) -> str:
        """The type that all tensors are stored in, as safetensors calls it."""
        return next(iter(self.headers().values())).dtype

    def headers(self) -> dict[str, TensorInfo]:
        """What exits.safetensors holds."""
        from safetensors import SafetensorError, safe_open

        file = self.path / TENSORS
        try:
            with safe_open(file, framework="numpy") as stored:
                slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
                return {
                    name: TensorInfo(TENSORS, part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise _damaged(file, one_line(str(error), 120)) from None

    def _check_tensors(self, base: Checkpoint) -> None:
        if base.n_layers != self.n_layers:
            raise _damaged(self.path / FACTS, f"it says {self.n_layers} layers")
        held = self.headers()
        wanted = {
            name: tuple(base.dims[symbol] for symbol in rule.shape)
            for exit in self.exits
            for name, rule in self.names(base, exit)
        }
        for name in sorted(wanted.keys() ^ held.keys()):
            lacking = "is missing" if name in wanted else "does not belong there"
            raise _damaged(self.path / TENSORS, f"{name} {lacking}")
        for name, shape in wanted.items():
            if held[name].shape != shape or held[name].dtype not in DTYPE_BYTES:
                raise _damaged(
                    self.path / TENSORS,
                    f"{name} is {held[name].dtype} {list(held[name].shape)}, not {list(shape)}",
                )
        if len({info.dtype for info in held.values()}) > 1:
            raise _damaged(self.path / TENSORS, "its tensors are of several types")


def parse_exits(text: str) -> tuple[int, ...]:
    """Read `8,15,22`. Raises ShortstackError for anything else."""
    if not re.fullmatch(r"\s*\d{1,6}\s*(,\s*\d{1,6}\s*)*", text):
        raise ShortstackError(f"cannot read layers {text!r}. Write numbers: 8,15,22")
    return tuple(int(part) for part in text.split(","))


def is_exits(path: Path) -> bool:
    return (path / FACTS).is_file()


def check_exits(exits: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Exits sorted. Raises ShortstackError for one outside the model, or named twice."""
    found = tuple(sorted(set(exits)))
    if not found or len(found) != len(exits):
        raise ShortstackError(
            f"exits must be named once each, got {_listed(exits) or 'none'}. Write e.g. 8,15,22"
        )
    outside = [exit for exit in found if not 0 < exit < n_layers]
    if outside:
        raise ShortstackError(
            f"there is no exit behind {outside[0]} layers: the model has {n_layers}. "
            f"Name exits from 1 to {n_layers - 1}."
        )
    return found


def layer_rules(base: Checkpoint) -> tuple[TensorRule, ...]:
    """The tensors of the base's last layer, which exits have, too."""
    last = base.n_layers - 1
    return tuple(r for r in base.family.layer if base.family.layer_name(last, r) in base.tensors)


def norm_rule(base: Checkpoint) -> TensorRule:
    """The base's norm before the head."""
    return next(r for r in base.family.outer if r.hf.endswith("model.norm.weight"))


def read_exits(path: Path, model: Path | None = None) -> ExitFolder:
    """Read exits.json and hold the tensors' file against its checksum.

    `model`: where the base lies now, if not where it was. Raises ShortstackError for a folder that
    has no exits, another schema, a missing field and a file that was changed.
    """
    file = path / FACTS
    if not file.is_file():
        raise ShortstackError(
            f"{path} has no exits: there is no {FACTS}. Train some with: shortstack exits train"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ShortstackError(
                f"{file} has schema {one_line(repr(data['schema']), 60)}, this version reads "
                f"{SCHEMA}. Train again."
            )
        if not all(type(one) is int for one in (data["n_layers"], *data["exits"])):
            raise TypeError("exits and n_layers must be whole numbers")
        if len(data["base"]["path"]) > LONGEST_PATH:
            raise ValueError(f"the base's path has {len(data['base']['path'])} characters")
        made = ExitFolder(
            path=path,
            base=model or _base(path, data["base"]["path"]),
            base_sha256=str(data["base"]["sha256"]),
            n_layers=data["n_layers"],
            exits=tuple(data["exits"]),
            init=data["init"],
            sha256=data["tensors_sha256"],
            facts=data["facts"],
            place="" if model else data["base"]["path"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, one_line(f"{type(error).__name__} {error}", 120)) from None
    if made.init not in INITS:
        raise unknown(f"init in {file}", one_line(str(made.init), 60), INITS)
    check_exits(made.exits, made.n_layers)
    tensors = path / TENSORS
    if not tensors.is_file() or hash_file(tensors) != made.sha256:
        raise _damaged(tensors, "it is missing or its checksum is wrong")
    return made


def write_exits(
    folder: Path,
    base: Checkpoint,
    exits: Sequence[int],
    init: str,
    tensors: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    lies_at: Path | None = None,
) -> ExitFolder:
    """Write both files into the existing `folder`; `tensors` are torch's, by their names in the
    file. `lies_at`: where `folder` will lie, from which the base's place is counted."""
    from safetensors.torch import save_file

    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS
    )
    place = os.path.relpath(base.path.resolve(), (lies_at or folder).resolve())
    data = {
        "tool": "shortstack",
        "schema": SCHEMA,
        "base": {"sha256": base.sha256, "path": Path(place).as_posix()},
        "n_layers": base.n_layers,
        "exits": list(check_exits(exits, base.n_layers)),
        "init": init,
        "tensors_sha256": hash_file(folder / TENSORS),
        "facts": dict(facts),
    }
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")
    return read_exits(folder, base.path)


def _listed(exits: Sequence[int]) -> str:
    return ", ".join(map(str, exits))


def _base(path: Path, place: str) -> Path:
    if (path / "config.json").is_file():
        return path
    near = Path(os.path.normpath(path / place))
    # of a link to the folder, the place is counted from where it points to
    return near if near.exists() else Path(os.path.normpath(path.resolve() / place))


def _damaged(file: Path, why: str) -> ShortstackError:
    return ShortstackError(f"{file} is damaged: {why}. Train the exits again.")
