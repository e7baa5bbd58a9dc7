"""Headers made to harm: checksums that are right, contents that are not."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.packed_models import pack, write_coded

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.packed.file import PackedFile
from shortstack.packed.header import NO_DIGEST, PREFIX, Contents, encode
from shortstack.packed.read import plain_chunks, read_whole
from shortstack.packed.unpack import unpack_folder
from shortstack.safetensors_header import parse_head

MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> PackedFile:
    folder = tmp_path_factory.mktemp("hostile")
    return pack(write_coded(tiny, folder / "model"), folder / "model.safetensors", "zstd")


def rewritten(
    packed: PackedFile, to: Path, edit: Callable[[dict[str, Any]], None], blobs: bytes | None = None
) -> Path:
    """The file with an edited document, offsets and checksums made to fit."""
    whole = packed.path.read_bytes()
    data = whole[8 + int.from_bytes(whole[:8], "little") :] if blobs is None else blobs
    document = json.loads(packed.contents.model_dump_json())
    edit(document)
    table, at = {}, 0
    for entry in document["entries"]:
        place = entry["kind"] if entry["kind"] in ("file", "shard") else "tensor"
        stop = at + entry["coded_bytes"]
        table[f"{place}:{entry['name']}"] = {
            "dtype": "U8",
            "shape": [entry["coded_bytes"]],
            "data_offsets": [at, stop],
        }
        at = stop
    to.write_bytes(sealed(json.dumps(document), table) + data)
    return to


def sealed(document: str, table: dict[str, Any]) -> bytes:
    import hashlib

    text = PREFIX + NO_DIGEST + b'","packed":' + json.dumps(document).encode() + b"}"
    text += b"," + json.dumps(table).encode()[1:]
    whole = len(text).to_bytes(8, "little") + text
    at = 8 + len(PREFIX)
    return whole[:at] + hashlib.sha256(whole).hexdigest().encode() + whole[at + 64 :]


def entry_of(document: dict[str, Any], name: str = MATRIX) -> dict[str, Any]:
    found: dict[str, Any] = next(e for e in document["entries"] if e["name"] == name)
    return found


def huge(document: dict[str, Any]) -> None:
    """A petabyte that its few bytes are said to hold, consistent in itself."""
    entry = entry_of(document)
    rows = 2**20
    entry |= {"kind": "raw", "shape": [rows, 2**20], "chunk": 2**24, "coders": ["zstd"]}
    entry |= {"raw_bytes": 4 * rows * 2**20, "raw_sha256": entry["raw_sha256"][:1]}
    n_parts = rows * 2**20 // 2**24
    entry["parts"] = [[entry["coded_bytes"]], *[[0]] * (n_parts - 1)]


def bomb(document: dict[str, Any]) -> None:
    """A config.json of three gigabytes of zeros, consistent in itself."""
    entry, chunk, n_chunks = entry_of(document, "config.json"), 2**26, 48
    entry |= {"shape": [n_chunks * chunk], "raw_bytes": n_chunks * chunk, "chunk": chunk}
    entry["parts"] = [[entry["coded_bytes"]], *[[0]] * (n_chunks - 1)]


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "another version": lambda d: d.update(packed=2),
    "a field too many": lambda d: entry_of(d).update(note="x"),
    "a field missing": lambda d: entry_of(d).pop("chunk"),
    "a number as text": lambda d: entry_of(d).update(chunk="64"),
    "a negative size": lambda d: entry_of(d)["shape"].__setitem__(0, -1),
    "a huge dimension": lambda d: entry_of(d)["shape"].__setitem__(0, 2**60),
    "another shape": lambda d: entry_of(d)["shape"].__setitem__(0, 7),
    "many dimensions": lambda d: entry_of(d).update(shape=[1] * 99),
    "another type": lambda d: entry_of(d).update(dtype="F16"),
    "an unknown coder": lambda d: entry_of(d).update(coders=["pickle", "none"]),
    "a coder too few": lambda d: entry_of(d).update(coders=["zstd"]),
    "raw_bytes that lie": lambda d: entry_of(d).update(raw_bytes=1),
    "coded_bytes beyond the file": lambda d: entry_of(d).update(coded_bytes=2**40),
    "a chunk too large": lambda d: entry_of(d).update(chunk=2**30),
    "chunks of half a row": lambda d: entry_of(d).update(chunk=63),
    "no chunks": lambda d: entry_of(d).update(parts=[]),
    "parts that lie": lambda d: entry_of(d)["parts"][0].__setitem__(0, 2**33),
    "a name that climbs": lambda d: entry_of(d, "config.json").update(name="../config.json"),
    "a file of Python": lambda d: entry_of(d, "config.json").update(name="modeling.py"),
    "a shard that climbs": lambda d: entry_of(d, "model.safetensors").update(
        name="..model.safetensors"
    ),
    "a shard elsewhere": lambda d: entry_of(d, "model.safetensors").update(
        name="/tmp/model.safetensors"
    ),
    "an entry twice": lambda d: d["entries"].append(d["entries"][0]),
    "no checksum": lambda d: entry_of(d).update(coded_sha256=""),
    "a petabyte": huge,
    "a bomb": bomb,
}


@pytest.mark.parametrize("name", EDITS)
def test_a_header_that_lies_is_refused_before_it_costs_anything(
    name: str, packed: PackedFile, tmp_path: Path
) -> None:
    file = rewritten(packed, tmp_path / "x.safetensors", EDITS[name])
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(ShortstackError) as caught:
            unpack_folder(PackedFile(file), tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 60e6
    assert not list((tmp_path / "out").iterdir())


def test_a_bomb_is_refused_for_its_size(packed: PackedFile, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"config\.json: a file .* is too large"):
        PackedFile(rewritten(packed, tmp_path / "x.safetensors", bomb))


def test_the_edits_above_start_from_a_file_that_is_accepted(
    packed: PackedFile, tmp_path: Path
) -> None:
    file = rewritten(packed, tmp_path / "x.safetensors", lambda document: None)
    assert PackedFile(file).contents == packed.contents


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2**25 + 1).to_bytes(8, "little") + b"{" * (2**25 + 64),
        len(PREFIX).to_bytes(8, "little") + PREFIX,
    ],
)
def test_what_is_no_packed_file_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(text)
    with pytest.raises(ShortstackError, match="damaged or not a packed model"):
        PackedFile(tmp_path / "x.safetensors")


def crumbs(document: dict[str, Any]) -> None:
    """A file cut into chunks of one byte: lengths without end, consistent in themselves."""
    entry, n = entry_of(document, "config.json"), 6_000_000
    entry |= {"shape": [n], "raw_bytes": n, "chunk": 1, "coded_bytes": n, "coders": ["none"]}
    entry["parts"] = [[1]] * n


def lengths(document: dict[str, Any]) -> None:
    """Millions of lengths in one chunk."""
    entry_of(document)["parts"] = [[1] * 10_000_000]


@pytest.mark.parametrize("edit", [crumbs, lengths])
def test_a_header_of_lengths_alone_is_refused_before_it_is_parsed(
    edit: Callable[[dict[str, Any]], None], packed: PackedFile, tmp_path: Path
) -> None:
    file = rewritten(packed, tmp_path / "x.safetensors", edit)
    assert file.stat().st_size > 2e7
    tracemalloc.start()
    with pytest.raises(ShortstackError, match="header has more than 524288 values"):
        PackedFile(file)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_chunks_of_a_byte_are_refused(packed: PackedFile, tmp_path: Path) -> None:
    def few(document: dict[str, Any]) -> None:
        crumbs(document)
        entry = entry_of(document, "config.json")
        entry |= {"shape": [1000], "raw_bytes": 1000, "coded_bytes": 1000, "parts": [[1]] * 1000}

    with pytest.raises(ShortstackError, match=r"config\.json: its chunks are too small"):
        PackedFile(rewritten(packed, tmp_path / "x.safetensors", few))


@pytest.mark.parametrize("nested", ["[" * 200_000, "9" * 10_000, '{"a":1,"a":2}', "nul"])
def test_json_made_to_harm_is_refused(nested: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(sealed(nested, {"x": 1}))
    with pytest.raises(ShortstackError, match="damaged or not a packed model"):
        PackedFile(tmp_path / "x.safetensors")


def test_blobs_that_overlap_are_refused(packed: PackedFile, tmp_path: Path) -> None:
    whole = encode(packed.contents)
    table = json.loads(whole[8:])
    document = table.pop("__metadata__")["packed"]
    names = list(table)
    table[names[1]]["data_offsets"] = table[names[0]]["data_offsets"]
    head = packed.path.read_bytes()
    data = head[8 + int.from_bytes(head[:8], "little") :]
    (tmp_path / "x.safetensors").write_bytes(sealed(document, table) + data)
    with pytest.raises(ShortstackError, match="is not at bytes"):
        PackedFile(tmp_path / "x.safetensors")


def test_a_stream_that_decodes_to_more_is_refused(packed: PackedFile, tmp_path: Path) -> None:
    """A frame that tells, and holds, 2^26 zeros where a matrix of 16 kB is due."""
    import hashlib

    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    whole = packed.path.read_bytes()
    at = 8 + int.from_bytes(whole[:8], "little")
    blobs = b""
    for entry in packed.contents.entries:
        blob = whole[at : at + entry.coded_bytes]
        steps = entry.parts[0][1] if entry.name == MATRIX else 0
        blobs += bomb + blob[-steps:] if steps else blob
        at += entry.coded_bytes

    def edit(document: dict[str, Any]) -> None:
        entry = entry_of(document)
        steps = entry["parts"][0][1]
        entry["parts"] = [[len(bomb), steps]]
        entry["coded_bytes"] = len(bomb) + steps
        start = sum(e.coded_bytes for e in _before(packed.contents, MATRIX))
        blob = blobs[start : start + entry["coded_bytes"]]
        entry["coded_sha256"] = hashlib.sha256(blob).hexdigest()

    file = PackedFile(rewritten(packed, tmp_path / "x.safetensors", edit, blobs))
    entry = file.contents.tensors[MATRIX]
    tracemalloc.start()
    with pytest.raises(ShortstackError, match=f"{MATRIX} cannot be decoded"):
        list(plain_chunks(file, entry))
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def _before(contents: Contents, name: str) -> list[Any]:
    names = [entry.name for entry in contents.entries]
    return list(contents.entries[: names.index(name)])


def test_the_head_of_a_shard_must_hold_what_the_entries_say(
    packed: PackedFile, tmp_path: Path, tiny: Path
) -> None:
    (shard,) = [e for e in packed.contents.entries if e.name == "model.safetensors"]
    head = read_whole(packed, shard)
    assert {slot.name for slot in parse_head(head, "x")} == set(packed.contents.tensors)
    other = Checkpoint.open(tiny)
    with (other.path / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    twice = json.dumps(table)[:-1] + ', "model.norm.weight": 1}'
    table["model.norm.weight"]["data_offsets"] = [0, 2**50]
    for text in (json.dumps(table).encode(), twice.encode()):
        with pytest.raises(ShortstackError, match="truncated or not safetensors"):
            parse_head(len(text).to_bytes(8, "little") + text, "x")
