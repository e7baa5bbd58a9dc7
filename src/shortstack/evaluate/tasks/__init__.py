"""Tasks for lm-evaluation-harness on local files, e.g. `--tasks shortstack_choice`."""
