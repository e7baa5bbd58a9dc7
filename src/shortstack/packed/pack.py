"""A checkpoint into a packed file: each tensor read once, by chunks, coded as its sample said."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from shortstack import __version__
from shortstack.checkpoint import Checkpoint
from shortstack.entropy import bits_a_byte
from shortstack.errors import ShortstackError, one_line
from shortstack.packed import choose
from shortstack.packed.choose import PLAIN, Choice, Tries
from shortstack.packed.coders import Bytes, coder
from shortstack.packed.header import CHUNK_BYTES, Contents, Entry, first_fault
from shortstack.packed.sources import Source, sources
from shortstack.packed.tensors import split_floats
from shortstack.progress import OnProgress, silent

TOOL = f"shortstack {__version__}"
Append = Callable[[bytes], object]


@dataclass(frozen=True)
class Packing:
    """One tensor, packed: its entry, why so, and how long coding all of it took, seconds."""

    entry: Entry
    choice: Choice
    encode_s: float

    def row(self, unpack_s: float) -> dict[str, Any]:
        """A line of the table: bits a weight, bytes, MB/s of the checkpoint's bytes, all told:
        reading, hashing, splitting and coding."""
        entry, plain = self.entry, self.entry.n_elements * self.entry.itemsize
        return {
            "name": entry.name,
            "kind": entry.kind,
            "coders": list(entry.coders),
            "entropy_bits": round(self.choice.entropy_bits, 4),
            "coded_bits": round(8 * entry.coded_bytes / max(1, entry.n_elements), 4),
            "n_weights": entry.n_elements,
            "plain_bytes": plain,
            "coded_bytes": entry.coded_bytes,
            "encode_mb_s": round(plain / 1e6 / max(self.encode_s, 1e-9), 1),
            "decode_mb_s": round(plain / 1e6 / max(unpack_s, 1e-9), 1),
            "reason": self.choice.reason,
        }


def pack_sources(
    checkpoint: Checkpoint,
    open_blob: Callable[[Source], Any],
    allowed: Tries,
    progress: OnProgress = silent,
) -> Iterator[Packing]:
    """Pack everything. `open_blob` gives what bytes are appended to, with `begin` and `append`."""
    todo = list(sources(checkpoint))
    for done, source in enumerate(todo, 1):
        yield pack_one(source, open_blob(source), allowed)
        progress(done, len(todo))


def pack_one(source: Source, sink: Any, allowed: Tries) -> Packing:
    """Code a source into `sink`; stored plain where coding did not pay in the end."""
    choice = choose_for(source, allowed)
    sink.begin()
    start = time.perf_counter()
    entry = encode_source(source, choice, sink.append)
    most = entry.raw_bytes * (1 - choose.LEAST_SAVING)
    if entry.kind in ("raw", "float-split") and choice.coded and entry.coded_bytes > most:
        choice = Choice("raw", (PLAIN,), choice.entropy_bits, "the sample promised more")
        sink.begin()
        entry = encode_source(source, choice, sink.append)
    return Packing(entry, choice, time.perf_counter() - start)


def choose_for(source: Source, allowed: Tries) -> Choice:
    """Try the coders on a sample of the source."""
    if source.kind in ("file", "shard"):
        data = source.read(0, source.n_elements)
        texts = [*choose.without_ans(allowed)]
        texts += [("zstd", "matching", 0.0)] if texts else []
        stream = choose.choose_stream(data, 1, texts)
        return Choice(source.kind, (stream,), bits_a_byte(data), "a file")
    if source.n_elements == 0:
        return Choice("raw", (PLAIN,), 0.0, "empty")
    if source.codes is not None:
        ranges = choose.places_of_codes(source.n_elements, source.columns)
        parts = [source.read_codes(*place) for place in ranges]
        codes, steps = (choose.joined([part[i] for part in parts]) for i in (0, 1))
        return choose.choose_codes(codes, steps, source.columns, allowed)
    ranges = choose.places(source.n_elements, source.columns, source.itemsize)
    data = choose.joined([source.read(*place) for place in ranges])
    return choose.choose_floats(data, source.itemsize, source.columns, allowed)


def encode_source(source: Source, choice: Choice, append: Append) -> Entry:
    """Code chunk by chunk; the entry says where everything lies."""
    itemsize = source.itemsize
    chunk = chunk_of(source)
    raw = [hashlib.sha256() for _ in range(2 if choice.kind == "row-codes" else 1)]
    coded, parts, raw_bytes = hashlib.sha256(), [], 0
    for start in range(0, source.n_elements, chunk):
        stop = min(source.n_elements, start + chunk)
        lengths: list[int] = []
        streams = _streams(source, choice.kind, start, stop, raw)
        for stream, how in zip(streams, choice.streams, strict=True):
            columns = stream_columns(choice.kind, len(lengths), source.columns, itemsize)
            data = coder(how.coder).encode(stream, columns, how.effort)
            append(data)
            coded.update(data)
            lengths.append(len(data))
            raw_bytes += stream.size
        parts.append(tuple(lengths))
    facts = {
        "name": source.name,
        "kind": choice.kind,
        "dtype": source.dtype,
        "shape": source.shape,
        "chunk": chunk,
        "coders": choice.coders,
        "parts": tuple(parts),
        "raw_bytes": raw_bytes,
        "coded_bytes": sum(map(sum, parts)),
        "raw_sha256": tuple(digest.hexdigest() for digest in raw),
        "coded_sha256": coded.hexdigest(),
    }
    try:
        return Entry.model_validate(facts)
    except ValidationError as error:
        raise _unpackable(source.name, error) from None


def _streams(source: Source, kind: str, start: int, stop: int, raw: list[Any]) -> list[Bytes]:
    """The streams of a chunk; `raw` hashes what they are made of."""
    if kind == "row-codes":
        streams = list(source.read_codes(start, stop))
        for digest, stream in zip(raw, streams, strict=True):
            digest.update(stream.data)
        return streams
    data = source.read(start, stop)
    raw[0].update(data.data)
    return split_floats(data, source.itemsize) if kind == "float-split" else [data]


def chunk_elements(columns: int, itemsize: int) -> int:
    """As many whole rows as fit a chunk; of longer rows a part."""
    most = CHUNK_BYTES // itemsize
    return most // columns * columns if columns <= most else most


def chunk_of(source: Source) -> int:
    """Elements of a source that are coded at once: of row codes whole rows, however long, as a row
    has one step."""
    chunk = chunk_elements(source.columns, source.itemsize)
    if source.codes is None:
        return chunk
    return max(chunk // source.columns, 1) * source.columns


def stream_columns(kind: str, stream: int, columns: int, itemsize: int) -> int:
    """Bytes of a row in a stream: what coders may group by."""
    if kind == "row-codes":
        return (columns, 2)[stream]
    return columns * itemsize if kind == "raw" else columns


def table(made: Iterable[Packing], unpack_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """The lines of all tensors, in the order of the file; `unpack_s` is what `prove` found."""
    return [p.row(unpack_s[p.entry.blob]) for p in made if p.entry.is_tensor]


def contents(entries: list[Entry]) -> Contents:
    try:
        return Contents(tool=TOOL, entries=tuple(entries))
    except ValidationError as error:
        raise _unpackable("the model", error) from None


def _unpackable(what: str, error: ValidationError) -> ShortstackError:
    return ShortstackError(
        f"{one_line(what, 100)} cannot be packed: {one_line(first_fault(error), 200)}. "
        "Leave it out, or report this model."
    )
