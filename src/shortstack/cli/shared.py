"""What the commands of the command line share: options, errors as one line, answers."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from shortstack.disk import FULL
from shortstack.errors import SettingError, ShortstackError, one_line

UNWRITABLE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""What the system says of a place that cannot be written or read."""
P = ParamSpec("P")

Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder, a .gguf file, pkg:PACKAGE/PATH, or hf:OWNER/NAME (downloads)."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes; must be ours.")]
Text = Annotated[
    str, typer.Option(help="Your text: .txt, .jsonl with a field 'text', or spdx (licences).")
]
Zst = Annotated[bool, typer.Option("--zst", help="Of a .gguf file also write .gguf.zst.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No bars, no table.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")]


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"shortstack: {one_line(message)}", err=True)
    raise typer.Exit(code)


def user_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a user can mend into one line and an exit code; let bugs keep their traceback."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        previous = signal.signal(signal.SIGTERM, _terminated)
        try:
            command(*args, **kwargs)
        except ShortstackError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(
                "interrupted. Nothing half-written is left; run the same command to go on.",
                2,
            )
        except OSError as error:
            if error.errno in FULL:
                _fail("disk full. Free some space or choose another -o.", 2)
            if error.errno not in UNWRITABLE:
                raise
            _fail(f"cannot use {error.filename}: {error.strerror}. Choose another place.", 2)
        finally:
            signal.signal(signal.SIGTERM, previous)

    return guarded


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def naming_options(**spelled: str) -> Iterator[None]:
    """Where a setting is refused, name the option that was typed: that of the same name, or the
    one given here for it."""
    try:
        yield
    except SettingError as error:
        option = spelled.get(error.name, error.name).replace("_", "-")
        raise ShortstackError(f"--{option} {error.fact}") from None


def answer(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False))
    else:
        show()
