"""The tensor types and file types of GGUF that we write, as llama.cpp names and numbers them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TypeFacts:
    """A tensor type of GGUF (ggml.h, ggml-common.h): its number, and the block that rows hold
    whole: so many weights in so many bytes."""

    number: int
    block: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, width: int) -> int:
        return width // self.block * self.block_bytes


TYPES: dict[str, TypeFacts] = {
    "F32": TypeFacts(0, 1, 4),
    "F16": TypeFacts(1, 1, 2),
    "BF16": TypeFacts(30, 1, 2),
    "Q8_0": TypeFacts(8, 32, 34),
    "Q6_K": TypeFacts(14, 256, 210),
    "Q5_1": TypeFacts(7, 32, 24),
    "Q5_0": TypeFacts(6, 32, 22),
    "Q5_K": TypeFacts(13, 256, 176),
    "Q4_1": TypeFacts(3, 32, 20),
    "Q4_0": TypeFacts(2, 32, 18),
    "Q4_K": TypeFacts(12, 256, 144),
    "IQ4_NL": TypeFacts(20, 32, 18),
    "IQ4_XS": TypeFacts(23, 256, 136),
    "MXFP4": TypeFacts(39, 32, 17),
    "NVFP4": TypeFacts(40, 64, 36),
    "Q3_K": TypeFacts(11, 256, 110),
    "IQ3_S": TypeFacts(21, 256, 110),
    "IQ3_XXS": TypeFacts(18, 256, 98),
    "Q2_K": TypeFacts(10, 256, 84),
    "IQ2_S": TypeFacts(22, 256, 82),
    "IQ2_XS": TypeFacts(17, 256, 74),
    "IQ2_XXS": TypeFacts(16, 256, 66),
    "TQ2_0": TypeFacts(35, 256, 66),
    "IQ1_M": TypeFacts(29, 256, 56),
    "TQ1_0": TypeFacts(34, 256, 54),
    "IQ1_S": TypeFacts(19, 256, 50),
    "Q1_0": TypeFacts(41, 128, 18),
}
"""Not Q2_0 (42): the gguf package cannot read files that hold it yet."""

FALLBACK: dict[str, str] = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What libllama takes where rows do not fit (llama-quant.cpp, tensor_type_fallback)."""

WITHOUT_FALLBACK = ("Q1_0", "NVFP4")
"""Blocks of more than 32 weights for which libllama has no fallback: it fails instead."""

NEED_IMPORTANCE = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
"""Types that libllama writes only with an importance matrix; Q2_K, too, in a Q2_K_S file."""


def fallback(kind: str, width: int) -> str:
    """The type that rows of `width` get where `kind` was wanted; F16 if nothing fits them."""
    if width % TYPES[kind].block == 0:
        return kind
    kind = FALLBACK.get(kind, kind)
    return kind if width % TYPES[kind].block == 0 else "F16"


@dataclass(frozen=True)
class Precision:
    """A file type: its number in llama.h and the type that most weights get (gguf_mix.py has
    the others)."""

    file_type: int
    body: str

    @property
    def quantized(self) -> bool:
        return TYPES[self.body].block > 1


PRECISIONS: dict[str, Precision] = {
    "F32": Precision(0, "F32"),
    "F16": Precision(1, "F16"),
    "BF16": Precision(32, "BF16"),
    "Q8_0": Precision(7, "Q8_0"),
    "Q6_K": Precision(18, "Q6_K"),
    "Q5_K_M": Precision(17, "Q5_K"),
    "Q5_K_S": Precision(16, "Q5_K"),
    "Q5_1": Precision(9, "Q5_1"),
    "Q5_0": Precision(8, "Q5_0"),
    "Q4_K_M": Precision(15, "Q4_K"),
    "Q4_K_S": Precision(14, "Q4_K"),
    "Q4_1": Precision(3, "Q4_1"),
    "Q4_0": Precision(2, "Q4_0"),
    "IQ4_NL": Precision(25, "IQ4_NL"),
    "IQ4_XS": Precision(30, "IQ4_XS"),
    "Q3_K_L": Precision(13, "Q3_K"),
    "Q3_K_M": Precision(12, "Q3_K"),
    "Q3_K_S": Precision(11, "Q3_K"),
    "IQ3_M": Precision(27, "IQ3_S"),
    "IQ3_S": Precision(26, "IQ3_S"),
    "IQ3_XS": Precision(22, "IQ3_S"),
    "IQ3_XXS": Precision(23, "IQ3_XXS"),
    "Q2_K": Precision(10, "Q2_K"),
    "Q2_K_S": Precision(21, "Q2_K"),
    "IQ2_M": Precision(29, "IQ2_S"),
    "IQ2_S": Precision(28, "IQ2_XS"),
    "IQ2_XS": Precision(20, "IQ2_XS"),
    "IQ2_XXS": Precision(19, "IQ2_XXS"),
    "TQ2_0": Precision(37, "TQ2_0"),
    "TQ1_0": Precision(36, "TQ1_0"),
    "IQ1_M": Precision(31, "IQ1_M"),
    "IQ1_S": Precision(24, "IQ1_S"),
    "Q1_0": Precision(40, "Q1_0"),
}
"""Not MXFP4_MOE: it gives MXFP4 to experts only, a dense model becomes Q8_0. The option `tensors`
gives any tensor MXFP4 or NVFP4."""
