"""Run lm-evaluation-harness's command line with our model and our tasks in it, offline."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shortstack.errors import ShortstackError, require

TASKS = Path(__file__).parent / "tasks"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def run(arguments: Sequence[str]) -> None:
    """What `lm_eval ARGUMENTS` does, with the model `shortstack` and the tasks beside this file.

    Raises MissingExtraError where lm-eval is not installed; exits as lm-eval does.
    """
    require(("lm_eval", "datasets"), "harness", "lm-evaluation-harness")
    for name in OFFLINE:  # read when their packages are first imported
        os.environ.setdefault(name, "1")
    from lm_eval.__main__ import cli_evaluate

    import shortstack.evaluate.harness  # noqa: F401  # registers the model

    before = sys.argv
    sys.argv = ["lm_eval", *with_tasks(arguments)]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise ShortstackError(f"{error}. See: shortstack lm-eval ls tasks") from None
    finally:
        sys.argv = before


def with_tasks(arguments: Sequence[str]) -> list[str]:
    """The arguments, with our folder of tasks where they name no other."""
    given = list(arguments)
    named = any(word.split("=")[0] == "--include_path" for word in given)
    runs = not given or given[0] == "run" or given[0].startswith("-")
    bare = not given or given[-1] in ("-h", "--help")
    return given if named or bare or not runs else [*given, "--include_path", str(TASKS)]
