"""Evaluation: how good a checkpoint or an artifact is, by the same rows and the same rules.

`scorer.py` says what a model must offer; `torch_scorer.py` and `session_scorer.py` offer it.
`metrics.py` has the formulas; `choice.py`, `perplexity.py` and `generation.py` one kind of set
each.
"""
