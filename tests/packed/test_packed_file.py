"""A packed file is the model: every byte comes back, and no changed byte goes unnoticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tests.packed_models import ODD, pack, write_coded
from tests.zoo import NAMES, make_model

from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.packed.choose import tries
from shortstack.packed.coders import Bytes
from shortstack.packed.file import PackedFile
from shortstack.packed.header import Entry
from shortstack.packed.pack import choose_for, encode_source
from shortstack.packed.read import plain_chunks, verify
from shortstack.packed.sources import ReadBytes, Source, left_out
from shortstack.packed.unpack import unpack_folder
from shortstack.row_codes import RowCodes, RowCodesReader, RowCodesWriter

SHAPES: list[tuple[int, ...]] = [
    *((), (0,), (1,), (5, 0), (0, 3), (1, 9), (9, 1), (2, 3, 5), (211, 173), (600, 2048)),
]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def unpacked(packed: PackedFile, folder: Path) -> Checkpoint:
    folder.mkdir()
    return unpack_folder(packed, folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    packed = pack(checkpoint, tmp_path / "model.safetensors")
    coded = sum(entry.coded_bytes for entry in packed.contents.tensors.values())
    assert coded < checkpoint.n_bytes
    unpacked(packed, tmp_path / "again")
    assert same_files(folder, tmp_path / "again")


@pytest.mark.parametrize("name", ["model (1).safetensors", "modèle+v2, ok.safetensors"])
def test_a_shard_of_any_legal_name_comes_back(name: str, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / name)
    packed = pack(Checkpoint.open(tmp_path / "model"), tmp_path / "x.safetensors", "none")
    unpacked(packed, tmp_path / "again")
    assert same_files(tmp_path / "model", tmp_path / "again")


@pytest.mark.parametrize("name", ["-rf.safetensors", "a:b.safetensors", "a\nb.safetensors"])
def test_a_shard_whose_name_no_folder_should_get_is_refused_in_one_line(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / name)
    with pytest.raises(ShortstackError, match="Rename it, also in"):
        pack(Checkpoint.open(tmp_path / "model"), tmp_path / "x.safetensors", "none")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_no_header_can_hold_is_refused_in_one_line(tmp_path: Path) -> None:
    data = np.zeros(4, np.uint8)
    source = Source("w" * 600, "tensor", "F32", (1,), reader(data, 4))
    with pytest.raises(ShortstackError, match="cannot be packed: name: String should have at most"):
        encode_source(source, choose_for(source, ()), lambda data: None)


@pytest.mark.parametrize("coder", ["auto", "zstd", "ans", "none"])
def test_row_codes_come_back_with_their_sidecar(coder: str, tiny: Path, tmp_path: Path) -> None:
    checkpoint = write_coded(tiny, tmp_path / "model", skip=("embed",))
    packed = pack(checkpoint, tmp_path / "model.safetensors", coder)
    kinds = {entry.kind for entry in packed.contents.tensors.values()}
    assert "row-codes" in kinds
    assert packed.contents.tensors["model.embed_tokens.weight"].kind != "row-codes"
    again = unpacked(packed, tmp_path / "again")
    assert same_files(tmp_path / "model", tmp_path / "again")
    assert again.sha256 == checkpoint.sha256


def test_codes_that_are_not_the_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = write_coded(tiny, tmp_path / "model")
    sidecar = load_file(tmp_path / "model" / SIDECAR)
    sidecar["model.layers.2.mlp.up_proj.weight.codes"][3, 5] += 1
    save_file(sidecar, tmp_path / "model" / SIDECAR)
    with pytest.raises(ShortstackError, match="codes of model.layers.2.mlp.up_proj.weight are not"):
        pack(checkpoint, tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("columns", [70_000, 2**22 + 5])
def test_row_codes_of_wide_rows_are_sampled_and_cut_by_whole_rows(
    columns: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(-3, 4, (5, columns), np.int8)
    matrix = RowCodes(codes, rng.uniform(0.01, 0.1, 5).astype(np.float16))
    data = matrix.weights().view(np.uint8).reshape(-1)
    with RowCodesWriter(tmp_path, {"w": (5, columns)}) as writer:
        writer.write("w", matrix)
    source = Source("w", "tensor", "F32", codes.shape, reader(data, 4), RowCodesReader(tmp_path))
    blob = bytearray()
    entry = encode_source(source, choose_for(source, tries("zstd", "fast")), blob.extend)
    assert entry.kind == "row-codes"
    assert entry.chunk % columns == 0
    found = list(plain_chunks(OneBlob(bytes(blob), entry), entry))
    assert b"".join(chunk.tobytes() for chunk in found) == data.tobytes()


@pytest.mark.parametrize("coder", ["auto", "ans", "none"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("BF16", "<u2"), ("F16", "<u2"), ("F32", "<u4"), ("F64", "<u8")]
)
def test_any_bits_of_any_shape_come_back(coder: str, dtype: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    shapes: list[tuple[int, ...]] = [
        (),
        (0,),
        (1,),
        (5, 0),
        (0, 3),
        (1, 9),
        (9, 1),
        (2, 3, 5),
        (211, 173),
    ]
    for shape in shapes:
        n = int(np.prod(shape))
        normal = rng.standard_normal(n).astype("<f4").view("<u4") >> 16
        bits = (normal.astype(kind) << (8 * np.dtype(kind).itemsize - 16)).astype(kind)
        bits[: len(ODD[kind])] = ODD[kind][:n]
        data = bits.view(np.uint8)
        source = Source("w", "tensor", dtype, shape, reader(data, bits.itemsize))
        blob = bytearray()
        entry = encode_source(source, choose_for(source, tries(coder, "best")), blob.extend)
        found = list(plain_chunks(OneBlob(bytes(blob), entry), entry))
        assert b"".join(chunk.tobytes() for chunk in found) == data.tobytes()


def reader(data: Bytes, itemsize: int) -> ReadBytes:
    return lambda start, stop: data[start * itemsize : stop * itemsize]


class OneBlob:
    """A blob in memory, read as one in a file is."""

    def __init__(self, data: bytes, entry: Entry) -> None:
        from shortstack.packed.header import GET_AGAIN, Contents

        self.path, self.sha256, self._data = Path("memory"), "", data
        self.remedy = GET_AGAIN
        self.contents = Contents(tool="test", entries=(entry,))

    def open_blob(self, entry: Entry):  # type: ignore[no-untyped-def]  # BytesIO closes itself
        import io

        return io.BytesIO(self._data)


def test_stock_safetensors_reads_the_blobs(tiny: Path, tmp_path: Path) -> None:
    packed = pack(Checkpoint.open(tiny), tmp_path / "model.safetensors")
    with safe_open(packed.path, framework="numpy") as file:
        assert set(file.metadata()) == {"header_sha256", "packed"}
        for entry in packed.contents.entries:
            blob = file.get_tensor(entry.blob)
            assert (blob.dtype, blob.shape) == (np.uint8, (entry.coded_bytes,))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> PackedFile:
    """The tiny model with row codes, but without its large tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint = write_coded(tiny, folder / "model", skip=("embed",))
    (folder / "model" / "tokenizer.json").unlink()
    return pack(checkpoint, folder / "model.safetensors")


def test_a_changed_bit_anywhere_is_found_and_named(small: PackedFile, tmp_path: Path) -> None:
    whole = small.path.read_bytes()
    file = tmp_path / "changed.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    stops, at = [], header
    for entry in small.contents.entries:
        at += entry.coded_bytes
        stops.append((at, entry.name))
    positions = [
        *range(8),
        *range(8, header, 509),
        *range(header, len(whole), 1009),
        len(whole) - 1,
    ]
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        file.write_bytes(changed)
        with pytest.raises(ShortstackError) as caught:
            verify(PackedFile(file))
        assert "\n" not in str(caught.value)
        if position >= header:
            assert next(name for stop, name in stops if position < stop) in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(small: PackedFile, tmp_path: Path) -> None:
    whole = small.path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "short.safetensors"
    for length in [*range(64), *range(64, header, 997), *range(header - 2, len(whole), 5003)]:
        file.write_bytes(whole[:length])
        with pytest.raises(ShortstackError, match="damaged or not a packed model"):
            PackedFile(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ShortstackError, match="damaged or not a packed model"):
        PackedFile(file)


def test_a_killed_packing_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    checkpoint = Checkpoint.open(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.n_bytes // 2)
    with pytest.raises(ShortstackError, match="truncated"):
        pack(checkpoint, tmp_path / "x.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_is_not_packed_is_told(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "README.md").write_text("kept")
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert left_out(checkpoint) == ["notes.txt"]
    unpacked(pack(checkpoint, tmp_path / "x.safetensors"), tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "kept"
    assert not (tmp_path / "again" / "notes.txt").exists()
