"""`shortstack lm-eval`: lm-evaluation-harness, with our runtimes behind its model `shortstack`."""

from __future__ import annotations

import typer

from shortstack.cli.shared import user_errors

SETTINGS = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "help_option_names": ["--shortstack-help"],  # --help is the harness's
}


@user_errors
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with its own options, e.g. --model shortstack --model_args
    path=out/gguf --tasks shortstack_choice. Offline unless HF_HUB_OFFLINE=0."""
    from shortstack.evaluate.harness_command import run

    run(context.args)
