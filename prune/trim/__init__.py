"""Tune, score, drop, repeat: depth taken out while the model learns the domain (TrimLLM)."""
