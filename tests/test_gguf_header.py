"""The header of a GGUF file: read as the gguf package reads it, and nothing believed unchecked."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.gguf_zoo import write_file

from shortstack.errors import ShortstackError
from shortstack.gguf_header import GGML_TYPES, check_vocabulary, read_header

KEY = b"llama.block_count"
NAME = b"blk.1.attn_q.weight"
BIG = 2**40


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers in Q8_0."""
    return write_file(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", range(3), kind="Q8_0")


@pytest.fixture(scope="session")
def content(model: Path) -> bytes:
    return model.read_bytes()


def test_the_header_is_what_the_gguf_package_reads(model: Path) -> None:
    header = read_header(model)
    reader = gguf.GGUFReader(model)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert {name: header.value(name) for name in header.keys} == fields
    assert [
        (t.name, t.dims, t.kind, t.offset + header.data_start, t.n_bytes) for t in header.tensors
    ] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]


def test_types_have_the_sizes_of_ggml() -> None:
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (kind.block, kind.n_bytes) for number, kind in GGML_TYPES.items()}
    assert {number: ours.get(number) for number in theirs} == theirs
    names = {int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES}
    assert {n: GGML_TYPES[n].name for n in names} == names


def put(content: bytes, at: int, form: str, value: int) -> bytes:
    raw = struct.pack(form, value)
    return content[:at] + raw + content[at + len(raw) :]


def after(content: bytes, name: bytes) -> int:
    return content.index(name) + len(name)


def tensor_field(content: bytes, word: int) -> int:
    """Where a word of the table row of NAME (two dimensions) is: 0 n_dims, 4 and 12 dims, 20 type,
    24 offset."""
    return after(content, NAME) + word


def tokens(content: bytes) -> int:
    """Where the type words of the token list are: array, string, count."""
    return after(content, b"tokenizer.ggml.tokens")


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "not a GGUF file"),
    "magic": (lambda c: b"GGML" + c[4:], "not a GGUF file"),
    "short": (lambda c: c[:20], "it ends after 20 bytes"),
    "version 1": (lambda c: put(c, 4, "<I", 1), "GGUF version 1; 2 and 3 can be read"),
    "big-endian": (lambda c: put(c, 4, ">I", 3), "is big-endian"),
    "tensors": (lambda c: put(c, 8, "<Q", BIG), "claims 1,099,511,627,776 tensors"),
    "keys": (lambda c: put(c, 16, "<Q", BIG), "claims 1,099,511,627,776 key-values"),
    "key": (lambda c: put(c, 24, "<Q", BIG), "a key at byte 32 reaches beyond the end"),
    "key not UTF-8": (lambda c: c.replace(KEY, b"\xff" + KEY[1:]), "is not UTF-8"),
    "key type": (lambda c: put(c, after(c, KEY), "<I", 99), "block_count' has the unknown type 99"),
    "nested array": (lambda c: put(c, tokens(c) + 4, "<I", 9), "has the unknown type 9"),
    "items": (lambda c: put(c, tokens(c) + 8, "<Q", BIG), "1,099,511,627,776 items in 'tok"),
    "item": (lambda c: put(c, tokens(c) + 16, "<Q", BIG), "a string of 'tok.* beyond the end"),
    "key twice": (
        lambda c: c.replace(b"llama.attention.key_length", b"llama.attention.head_count"),
        "the key 'llama.attention.head_count' comes twice",
    ),
    "name twice": (
        lambda c: c.replace(b"blk.2.attn_q.weight", NAME),
        "the tensor 'blk.1.attn_q.weight' comes twice",
    ),
    "dimensions": (lambda c: put(c, tensor_field(c, 0), "<I", 9), "has 9 dimensions"),
    "row": (lambda c: put(c, tensor_field(c, 4), "<Q", 33), "Q8_0 has rows of 33 values"),
    "no row": (lambda c: put(c, tensor_field(c, 4), "<Q", 0), "Q8_0 has rows of 0 values"),
    "overflow": (lambda c: put(c, tensor_field(c, 12), "<Q", 2**62), "beyond the end"),
    "type": (lambda c: put(c, tensor_field(c, 20), "<I", 4), "has the unknown type 4"),
    "type without end": (lambda c: put(c, tensor_field(c, 20), "<I", 2**31), "the unknown type"),
    "offset": (lambda c: put(c, tensor_field(c, 24), "<Q", BIG), "beyond the end"),
    "misaligned": (lambda c: put(c, tensor_field(c, 24), "<Q", 33), "are not aligned"),
    "overlap": (lambda c: put(c, tensor_field(c, 24), "<Q", 0), "overlap"),
    "data cut off": (lambda c: c[:-64], "beyond the end"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(content))
    with pytest.raises(ShortstackError, match=words) as error:
        read_header(bad)
    assert str(bad) in str(error.value)
    assert str(error.value).endswith(("Download it again.", "convert it anew.", "-endian file."))
    assert "\n" not in str(error.value)


def spent(work: Callable[[], object]) -> tuple[float, int]:
    """CPU seconds and most bytes of Python's memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        work()
    except ShortstackError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return time.process_time() - start, peak


def test_random_damage_is_read_or_refused_quickly_and_without_memory(
    content: bytes, tmp_path: Path
) -> None:
    """Bits flipped, words replaced by large numbers, the end cut off, at 1500 places."""
    draw = random.Random(7)
    bad = tmp_path / "bad.gguf"
    header_bytes = len(content) - content[::-1].index(b"thgiew.") + 64
    for _ in range(500):
        at = draw.randrange(header_bytes)
        flipped = bytes([content[at] ^ 1 << draw.randrange(8)])
        large = struct.pack("<Q", draw.choice((BIG, 2**63, 2**64 - 1, 2**31)))
        for damaged in (
            content[:at] + flipped + content[at + 1 :],
            content[:at] + large + content[at + 8 :],
            content[:at],
        ):
            bad.write_bytes(damaged)
            seconds, peak = spent(lambda: read_header(bad))
            assert seconds < 2, at
            assert peak < 2**20, at


def test_every_truncation_is_refused(content: bytes, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    for size in range(0, len(content), 997):
        bad.write_bytes(content[:size])
        with pytest.raises(ShortstackError):
            read_header(bad)


def test_a_wrong_alignment_is_refused(tmp_path: Path) -> None:
    bad = write_file(tmp_path / "a.gguf", "llama", [0], keys={"general.alignment": 48})
    with pytest.raises(ShortstackError, match="general.alignment is no power of two"):
        read_header(bad)


def test_another_alignment_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.add_tensor("b", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(file)
    assert header.alignment == 256
    assert [t.offset for t in header.tensors] == [0, 256]


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path: Path) -> None:
    few = {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    bad = read_header(write_file(tmp_path / "v.gguf", "llama", [0], keys=few))
    with pytest.raises(ShortstackError, match="has 3 tokens, its embedding 128 rows"):
        check_vocabulary(bad)
    check_vocabulary(read_header(write_file(tmp_path / "w.gguf", "llama", [0])))
