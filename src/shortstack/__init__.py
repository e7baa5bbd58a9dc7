"""shortstack: make a language model shallower, export it, prove the export, measure it."""

__version__ = "0.1.0"
