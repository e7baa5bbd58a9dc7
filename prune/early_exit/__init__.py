"""Fit early exits: states, classifiers, thresholds (AdaInfer, arXiv:2403.02181)."""
