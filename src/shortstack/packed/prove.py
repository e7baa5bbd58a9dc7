"""A packed model against what it was made of, bit for bit, in memory."""

from __future__ import annotations

import time

import numpy as np

from shortstack.checkpoint import Checkpoint
from shortstack.errors import VerificationError
from shortstack.packed.header import Entry
from shortstack.packed.read import Packed, plain_chunks
from shortstack.packed.sources import Source, sources


def prove(packed: Packed, checkpoint: Checkpoint) -> dict[str, float]:
    """Compare every entry with its source; returns, by blob, the seconds of reading, checking and
    decoding it.

    Raises VerificationError that names the first that differs.
    """
    entries = {entry.blob: entry for entry in packed.contents.entries}
    taken = {}
    for source in sources(checkpoint):
        entry = entries.pop(source.blob, None)
        if entry is None:
            raise VerificationError(f"{packed.path} lacks {source.name}. Pack the model again.")
        taken[source.blob] = _compare(packed, entry, source)
    if entries:
        raise VerificationError(
            f"{packed.path} holds {next(iter(entries))}, which the model has not. Pack it again."
        )
    return taken


def _compare(packed: Packed, entry: Entry, source: Source) -> float:
    chunks, at, taken = plain_chunks(packed, entry), 0, 0.0
    while True:
        began = time.perf_counter()
        chunk = next(chunks, None)
        taken += time.perf_counter() - began
        if chunk is None:
            break
        stop = at + chunk.size // source.itemsize
        if not np.array_equal(chunk, source.read(at, stop)):
            raise _differs(packed, source)
        at = stop
    if at != source.n_elements:
        raise _differs(packed, source)
    return taken


def _differs(packed: Packed, source: Source) -> VerificationError:
    return VerificationError(
        f"{packed.path}: {source.name} does not unpack to what it was made of. "
        "Export with --option coder=none, and report this."
    )
