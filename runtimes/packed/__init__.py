"""Layers of PyTorch that compute with the codes of a packed model: docs/packed_runtime.md."""
