"""Is it worth it: every coder tried on a sample of a tensor, the choice with its reason.

By sizes alone, never by speeds: the same model is packed alike everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.entropy import bits_a_byte
from shortstack.errors import require, unknown
from shortstack.packed.coders import Bytes, coder
from shortstack.packed.tensors import split_floats

SAMPLE_BYTES = 2**18
"""Of floats, in each of SAMPLES places."""

SAMPLES = 4
CODES_SAMPLED = 2**20
"""In each place: together a chunk. Tables and lanes of ANS weigh more in less: of a matrix of which
it saves 2.9 % a sixteenth of a chunk said 0.1 %, a quarter 2.2 %."""

LEAST_SAVING = 0.01
"""What coding must save of a tensor, or of a stream, to be worth a decoder at all."""

ANS_SAVING = 0.02
"""What ANS must save beyond Zstandard, which decodes 15 to 20 times as fast. Of floats it never
does: the Huffman codes of BF16 exponents lose 0.06 bits of 10.6."""

ANS_LEAST_BYTES = 2**16
"""Smaller streams have too few lanes to be fast: `auto` does not try it."""

EFFORTS = {
    "fast": ("fast",),
    "matching": ("fast", "matching"),
    "best": ("fast", "matching", "best"),
}
"""Word of the option -> efforts of Zstandard that are tried."""

CODER_WORDS: dict[str, tuple[str, ...]] = {
    "auto": ("zstd", "ans"),
    "smallest": ("zstd", "ans"),
    "zstd": ("zstd",),
    "ans": ("ans",),
    "none": (),
}
Tries = Sequence[tuple[str, str, float]]
"""(coder, effort, what it must save beyond a coder that decodes faster to be taken)."""


@dataclass(frozen=True)
class StreamChoice:
    """How one stream is coded, and what it takes of its plain bytes."""

    coder: str
    effort: str
    share: float


PLAIN = StreamChoice("none", "fast", 1.0)


@dataclass(frozen=True)
class Choice:
    """How a tensor is packed. `entropy_bits` is a weight's, each stream's bytes independent."""

    kind: str
    streams: tuple[StreamChoice, ...]
    entropy_bits: float
    reason: str

    @property
    def coders(self) -> tuple[str, ...]:
        return tuple(stream.coder for stream in self.streams)

    @property
    def coded(self) -> bool:
        return any(coder != "none" for coder in self.coders)


OPTIONS: dict[str, tuple[str, ...]] = {"coder": tuple(CODER_WORDS), "effort": tuple(EFFORTS)}
"""`coder`: what may be used (auto: Zstandard, and ANS where it saves much more; smallest: ANS where
it saves anything, in fewer lanes); `effort` of Zstandard: fast (Huffman codes nearly alone),
matching (also level 3), best (also level 19)."""


def options(given: Mapping[str, str]) -> Tries:
    """What the options of the command line let us try. Raises ShortstackError for unknown ones, and
    MissingExtraError where Zstandard is not installed."""
    for option, value in given.items():
        if option not in OPTIONS:
            raise unknown("option of the packed export", option, OPTIONS)
        if value not in OPTIONS[option]:
            raise unknown(f"value of {option}", value, OPTIONS[option])
    found = tries(given.get("coder", "auto"), given.get("effort", "matching"))
    if any(name == "zstd" for name, *_ in found):
        require(("zstandard",), "pack", "Zstandard")
    return found


def tries(word: str, effort: str) -> Tries:
    """What the options let us try, in the order of decoding speed."""
    saving, of_ans = (0.0, "best") if word == "smallest" else (ANS_SAVING, "fast")
    found = []
    for name in CODER_WORDS[word]:
        found += [(name, e, saving) for e in (EFFORTS[effort] if name == "zstd" else (of_ans,))]
    return found


def _ans_must_pay(allowed: Tries) -> bool:
    """Whether ANS has a faster coder beside it and must save much more: of `auto` alone."""
    return len(allowed) > 1 and any(name == "ans" and saving for name, _, saving in allowed)


def without_ans(allowed: Tries) -> Tries:
    return [each for each in allowed if each[0] != "ans"]


def places(n_elements: int, columns: int, itemsize: int) -> list[tuple[int, int]]:
    """(start, stop) of the sample of floats: whole rows in SAMPLES places, or all of a small
    tensor. Of rows longer than a place only as much as fits it."""
    wanted = SAMPLE_BYTES // itemsize
    return _places(n_elements, columns, wanted, wanted if columns > wanted else columns)


def places_of_codes(n_elements: int, columns: int) -> list[tuple[int, int]]:
    """The same of row codes: whole rows, however long."""
    return _places(n_elements, columns, CODES_SAMPLED, columns)


def _places(n_elements: int, columns: int, wanted: int, least: int) -> list[tuple[int, int]]:
    """`least`: what a place's length is a multiple of."""
    if n_elements <= SAMPLES * wanted:
        return [(0, n_elements)]
    length = max(1, wanted // least) * least
    last = (n_elements - length) // columns * columns
    starts = {last * i // (SAMPLES - 1) // columns * columns for i in range(SAMPLES)}
    return [(start, start + length) for start in sorted(starts)]


def choose_floats(data: Bytes, itemsize: int, columns: int, allowed: Tries) -> Choice:
    """Split or not, by the sample's bytes `data`, shape (n * itemsize,)."""
    if _ans_must_pay(allowed):  # it never does
        allowed = without_ans(allowed)
    streams = split_floats(data, itemsize)
    bits = sum(bits_a_byte(stream) for stream in streams)
    split = tuple(choose_stream(stream, columns, allowed) for stream in streams)
    whole = (choose_stream(data, columns * itemsize, without_ans(allowed)),)
    share_split = sum(stream.share for stream in split) / itemsize
    if min(share_split, whole[0].share) > 1 - LEAST_SAVING:
        return Choice("raw", (PLAIN,), bits, f"nothing saves {LEAST_SAVING:.0%}")
    if whole[0].share < share_split:
        return Choice("raw", whole, bits, "its values repeat: better uncut")
    return Choice("float-split", split, bits, "exponents are coded alone")


def choose_codes(codes: Bytes, steps: Bytes, columns: int, allowed: Tries) -> Choice:
    """Coders of the two streams of row codes."""
    chosen = choose_stream(codes, columns, allowed)
    names, saving = {name for name, *_ in allowed}, max((each[2] for each in allowed), default=0.0)
    reasons = {
        "none": f"nothing saves {LEAST_SAVING:.0%}",
        "zstd": f"ANS would not save {saving:.0%} more" if saving else "ANS would not save more",
        "ans": f"saves {saving:.0%} beyond Zstandard" if saving else "the smallest",
    }
    reason = reasons[chosen.coder] if len(names) > 1 else "as asked"
    steps_choice = choose_stream(steps, 2, without_ans(allowed))
    return Choice("row-codes", (chosen, steps_choice), bits_a_byte(codes), reason)


def choose_stream(data: Bytes, columns: int, allowed: Tries) -> StreamChoice:
    """The coder that pays for one stream."""
    best = PLAIN
    for name, effort, saving in allowed:
        if name == "ans" and data.size < ANS_LEAST_BYTES and _ans_must_pay(allowed):
            continue
        tried = _try(name, effort, data, columns)
        enough = LEAST_SAVING if best.coder == "none" else saving
        if name == best.coder:
            enough = 0.0
        if tried.share < best.share * (1 - enough):
            best = tried
    return best


def _try(name: str, effort: str, data: Bytes, columns: int) -> StreamChoice:
    coded = coder(name).encode(data, columns, effort)
    return StreamChoice(name, effort, len(coded) / max(1, data.size))


def joined(parts: Sequence[Bytes]) -> Bytes:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
