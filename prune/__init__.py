"""Choose layers to drop, and cut them out of the files."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, require, unknown
from shortstack.progress import OnProgress, silent
from shortstack.prune.apply import apply_plan
from shortstack.prune.plan import PrunePlan, Removal, parse_drop, parse_removal
from shortstack.prune.predict import predict_prune, preview
from shortstack.prune.sources import cut_identity

__all__ = [
    "METHODS",
    "Method",
    "PrunePlan",
    "Removal",
    "apply_plan",
    "check_options",
    "cut_identity",
    "parse_drop",
    "parse_removal",
    "planner",
    "predict_prune",
    "preview",
]


@dataclass(frozen=True)
class Method:
    """One way to choose layers: where its planner is, and whether it reads the user's text.

    `sub_blocks`: what it counts and removes are sub-blocks, not layers.
    """

    target: str
    needs_text: bool
    sub_blocks: bool = False


METHODS = {
    "angular": Method("shortstack.prune.angular:angular", needs_text=True),
    "cosine-run": Method("shortstack.prune.cosine_run:cosine_run", needs_text=True),
    "every": Method("shortstack.prune.methods:every", needs_text=False),
    "explicit": Method("shortstack.prune.methods:explicit", needs_text=False),
    "greedy": Method("shortstack.prune.greedy:greedy", needs_text=True),
    "influence": Method("shortstack.prune.influence:influence", needs_text=True),
    "laco": Method("shortstack.prune.laco:laco", needs_text=True),
    "last": Method("shortstack.prune.methods:last", needs_text=False),
    "perplexity": Method("shortstack.prune.leave_one_out:perplexity", needs_text=True),
    "random": Method("shortstack.prune.methods:at_random", needs_text=False),
    "repaired": Method("shortstack.prune.repaired:repaired", needs_text=True),
    "repaired-sub-block": Method(
        "shortstack.prune.repaired_sub_block:repaired_sub_block", needs_text=True, sub_blocks=True
    ),
    "shapley": Method("shortstack.prune.shapley:shapley", needs_text=True),
    "sub-block": Method("shortstack.prune.sub_block:sub_block", needs_text=True, sub_blocks=True),
    "taylor": Method("shortstack.prune.taylor:taylor", needs_text=True),
}
"""Name -> method. A new one: a module and a line here."""


class Planner(Protocol):
    """Makes a plan. `drop` is a count, or for `explicit` what goes; options are the method's."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        *,
        drop: int | Removal,
        windows: list[list[int]],
        progress: OnProgress = silent,
        **options: Any,
    ) -> PrunePlan: ...


_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
"""Annotation of an option -> what its value may be."""


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Raise ShortstackError for an option that a method does not know, or of another type."""
    known = {
        option: parameter.annotation
        for option, parameter in inspect.signature(_function(name)).parameters.items()
        if option not in ("checkpoint", "drop", "windows", "progress")
    }
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of method {name!r}", option, known)
        wanted = known[option]
        if type(value) not in _TYPES[wanted]:
            raise ShortstackError(
                f"option {option!r} of method {name!r} must be of type {wanted}, got {value!r}. "
                "Mend the value."
            )


def _function(name: str) -> Callable[..., Any]:
    if name not in METHODS:
        raise unknown("prune method", name, METHODS)
    if METHODS[name].needs_text:
        require(("torch", "transformers"), "prune", f"the method {name!r}")
    module, _, function = METHODS[name].target.partition(":")
    return cast(Callable[..., Any], getattr(importlib.import_module(module), function))


def planner(name: str) -> Planner:
    """The planner of a method; it refuses options that the method does not know."""
    make = _function(name)

    def plan(
        checkpoint: Checkpoint,
        *,
        drop: int | Removal,
        windows: list[list[int]],
        progress: OnProgress = silent,
        **options: Any,
    ) -> PrunePlan:
        check_options(name, options)
        if METHODS[name].needs_text and not windows:
            raise ShortstackError(f"method {name!r} reads text. Give a text file to score on.")
        made = make(checkpoint, drop=drop, windows=windows, progress=progress, **options)
        return cast(PrunePlan, made)

    return plan
