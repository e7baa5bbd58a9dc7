"""The tensor types and file types of GGUF that we write, as llama.cpp names and numbers them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TypeFacts:
    """A tensor type of GGUF: bits a weight, and what a row must be a multiple of."""

    bits: float
    block: int


TYPES: dict[str, TypeFacts] = {
    "F32": TypeFacts(32, 1),
    "F16": TypeFacts(16, 1),
    "BF16": TypeFacts(16, 1),
    "Q8_0": TypeFacts(8.5, 32),
    "Q5_1": TypeFacts(6, 32),
    "Q5_0": TypeFacts(5.5, 32),
    "Q4_1": TypeFacts(5, 32),
    "Q4_0": TypeFacts(4.5, 32),
    "Q6_K": TypeFacts(6.5625, 256),
    "Q5_K": TypeFacts(5.5, 256),
    "Q4_K": TypeFacts(4.5, 256),
}

FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
"""What libllama takes where a row is no multiple of 256."""


@dataclass(frozen=True)
class Precision:
    """A file type: its number in llama.h, the type of most weights and of the head by default."""

    file_type: int
    body: str
    head: str
    quantized: bool = True


PRECISIONS: dict[str, Precision] = {
    "F32": Precision(0, "F32", "F32", quantized=False),
    "F16": Precision(1, "F16", "F16", quantized=False),
    "BF16": Precision(32, "BF16", "BF16", quantized=False),
    "Q8_0": Precision(7, "Q8_0", "Q8_0"),
    "Q6_K": Precision(18, "Q6_K", "Q6_K"),
    "Q5_K_M": Precision(17, "Q5_K", "Q6_K"),
    "Q4_K_M": Precision(15, "Q4_K", "Q6_K"),
    "Q4_1": Precision(3, "Q4_1", "Q6_K"),
    "Q4_0": Precision(2, "Q4_0", "Q6_K"),
}
