"""The errors a user can mend. Anything else is a bug of ours and keeps its traceback."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from typing import Any


class ShortstackError(Exception):
    """A user can mend this. One line: the thing, the fact, the next step. Exit code 2."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes: a constructor that takes more than the message is not called again."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[ShortstackError], args: tuple[Any, ...], state: dict[str, Any]
) -> ShortstackError:
    made = kind.__new__(kind, *args)
    made.__dict__.update(state)
    return made


class SettingError(ShortstackError):
    """A setting that cannot be. `name` is that of the field: a command calls it otherwise."""

    def __init__(self, name: str, fact: str) -> None:
        super().__init__(f"{name} {fact}")
        self.name, self.fact = name, fact


class VerificationError(ShortstackError):
    """An artifact computes something else than its checkpoint, or costs more than its gate allows.

    Exit code 1: the request was sound, the result was not.
    """

    exit_code = 1


class MissingExtraError(ShortstackError):
    """A package of an extra is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Run: pip install 'shortstack[{extra}]'"
        )


def one_line(text: str, limit: int = 600) -> str:
    """Fold white space, so that an error stays one line; cut at `limit` characters."""
    folded = " ".join(text.split())
    return folded if len(folded) <= limit else folded[: limit - 1] + "…"


def unknown(kind: str, name: str, known: Iterable[str]) -> ShortstackError:
    """Build the error for a name that no table holds, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ShortstackError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def require(packages: Iterable[str], extra: str, purpose: str) -> None:
    """Raise MissingExtraError for the first package that is not installed; imports nothing."""
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ValueError:  # sys.modules holds None for it
            found = None
        if found is None:
            raise MissingExtraError(package, extra, purpose)
