"""Measure artifacts in fresh processes, compare original and pruned, report. Never needs torch."""
