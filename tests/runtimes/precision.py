"""How tests that hold a runtime against float32 open it."""

from __future__ import annotations


def exact(runtime: str) -> dict[str, str]:
    """Options that make a runtime compute in float32; most do by themselves."""
    return {"dtype": "float32"} if runtime == "pytorch-packed" else {}
