"""A rule as a file: arrays and facts in one safetensors file, under one checksum. No pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.disk import disk_errors
from shortstack.early_exit.rule import Rule
from shortstack.errors import ShortstackError, one_line, require
from shortstack.manifest import partial_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 1
FORMAT = "shortstack early exit"
ARRAYS = ("weights", "bias", "probe", "probe_bias")
PLAIN = ("check", "kind", "threshold", "model_sha256", "n_layers")
SUFFIX = ".safetensors"
LARGEST_BYTES = 1 << 30
"""A rule of a 70B model with 40 checks of 100 answers is below it."""


def write_rule(rule: Rule, file: Path) -> None:
    """Write the rule under its final name at once or not at all."""
    require(("safetensors",), "prune", "writing an early exit")
    from safetensors.numpy import save

    arrays = {name: array for name in ARRAYS if (array := getattr(rule, name)) is not None}
    facts = _facts(rule)
    said = {"format": FORMAT, "facts": facts, "sha256": _checksum(facts, arrays)}
    partial = partial_of(file)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(save(arrays, said))
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def _facts(rule: Rule) -> str:
    plain = {name: getattr(rule, name) for name in PLAIN}
    plain |= {"layers": list(rule.layers), "answers": list(rule.answers)}
    return json.dumps({"schema": SCHEMA, **plain, "facts": dict(rule.facts)}, sort_keys=True)


def _checksum(facts: str, arrays: Mapping[str, NDArray[np.float32]]) -> str:
    total = hashlib.sha256(facts.encode())
    for name, array in sorted(arrays.items()):
        total.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def read_rule(file: Path) -> Rule:
    """Raises ShortstackError for a file that is none, of another schema, edited, or one whose
    numbers are not finite."""
    require(("safetensors",), "prune", "reading an early exit")
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ShortstackError(
            f"no file {file}. Fit an early exit with: shortstack exits fit MODEL --tune ROWS -o "
            "FILE"
        )
    if file.stat().st_size > LARGEST_BYTES:
        raise ShortstackError(f"{file} is too large for an early exit. Name another file.")
    try:
        with safe_open(file, framework="np") as opened:
            said = opened.metadata() or {}
            _check_kind(file, said)  # of a model not even the types of numbers may be known here
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
    except (SafetensorError, OSError) as error:
        raise ShortstackError(
            f"{file} cannot be read: {one_line(str(error), 200)}. Fit the early exit again."
        ) from None
    return _checked(file, said.get("facts", ""), said.get("sha256", ""), arrays)


def _check_kind(file: Path, said: Mapping[str, str]) -> None:
    if said.get("format") != FORMAT:
        raise ShortstackError(f"{file} is no early exit of shortstack. Name another file.")


def _checked(file: Path, facts: str, sha256: str, arrays: dict[str, Any]) -> Rule:
    import numpy as np

    try:
        told = json.loads(facts)
        schema = told["schema"]
    except (ValueError, KeyError, TypeError):
        raise ShortstackError(
            f"{file} does not say what it holds. Fit the early exit again."
        ) from None
    if schema != SCHEMA:
        raise ShortstackError(
            f"{file} is of schema {schema!r}, this shortstack reads {SCHEMA}. "
            "Fit the early exit again."
        )
    if _checksum(facts, arrays) != sha256:
        raise ShortstackError(
            f"{file} was changed after it was written: its checksum is another. "
            "Fit the early exit again."
        )
    for name, array in arrays.items():
        if name not in ARRAYS or array.dtype != np.float32 or not np.isfinite(array).all():
            raise ShortstackError(
                f"{file}: {name} is no array of finite float32 numbers of an early exit. "
                "Fit it again."
            )
    try:
        plain = {name: told[name] for name in PLAIN}
        whole = all(type(layer) is int for layer in told["layers"])
        if (
            not whole
            or type(plain["threshold"]) not in (int, float)
            or math.isnan(plain["threshold"])
        ):
            raise TypeError
        return Rule(
            layers=tuple(told["layers"]),
            answers=tuple(told["answers"]),
            facts=told["facts"],
            **plain,
            **arrays,
        )
    except (KeyError, TypeError):
        raise ShortstackError(f"{file} lacks what an early exit needs. Fit it again.") from None


def check_model(rule: Rule, sha256: str, name: str) -> None:
    """Raise ShortstackError where the rule was fitted to another model."""
    if rule.model_sha256 != sha256:
        raise ShortstackError(
            f"the early exit was fitted to another model ({rule.model_sha256[:12]}, {name} is "
            f"{sha256[:12]}). Fit one to this model: shortstack exits fit"
        )
