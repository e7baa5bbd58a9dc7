"""Every coder gives back every byte, and refuses bytes that it cannot have made."""

from __future__ import annotations

import numpy as np
import pytest
from tests.packed_models import ODD

from shortstack.entropy import bits_a_byte
from shortstack.errors import ShortstackError
from shortstack.packed.choose import EFFORTS
from shortstack.packed.coders import CODERS, CodingError, coder
from shortstack.packed.header import SLACK_BYTES
from shortstack.packed.tensors import join_floats, split_floats

RNG = np.random.default_rng(7)


def samples() -> list[tuple[np.ndarray, int]]:
    """(bytes, columns) of every sort: empty, single, constant, rows of unlike spread, noise."""
    spread = np.exp(RNG.standard_normal((48, 1)) * 1.5)
    rows = np.clip(RNG.standard_normal((48, 700)) * spread * 8, -127, 127).astype(np.int8)
    skewed = (RNG.random(100_003) < 0.001).astype(np.uint8) * 255
    return [
        (np.empty(0, np.uint8), 5),
        (np.array([200], np.uint8), 1),
        (np.full(70_000, 9, np.uint8), 7),
        (rows.view(np.uint8).reshape(-1), 700),
        (rows.view(np.uint8).reshape(-1)[:-3], 700),
        (skewed, 1),
        (RNG.integers(0, 256, 66_000).astype(np.uint8), 33),
        *((RNG.integers(0, 3, n).astype(np.uint8), n) for n in (2, 1023, 1025, 4099)),
    ]


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("effort", EFFORTS["best"])
def test_every_byte_comes_back(name: str, effort: str) -> None:
    used = coder(name)
    for data, columns in samples():
        coded = used.encode(data, columns, effort)
        assert np.array_equal(used.decode(coded, data.size, columns), data)
        assert len(coded) <= data.size + data.size // 64 + SLACK_BYTES


@pytest.mark.parametrize("name", CODERS)
def test_another_length_than_was_coded_is_refused(name: str) -> None:
    data, columns = samples()[3]
    coded = coder(name).encode(data, columns, "fast")
    for n_bytes in (data.size - columns, data.size + columns, 2**40):
        with pytest.raises(CodingError):
            coder(name).decode(coded, n_bytes, columns)


@pytest.mark.parametrize("name", ["zstd", "ans"])
def test_damaged_bytes_are_refused_or_decode_to_the_right_length(name: str) -> None:
    data, columns = samples()[3]
    coded = coder(name).encode(data, columns, "fast")
    for at in range(0, len(coded), 97):
        broken = bytearray(coded)
        broken[at] ^= 1 << (at % 8)
        try:
            found = coder(name).decode(bytes(broken), data.size, columns)
        except CodingError:
            continue
        assert found.size == data.size
    for length in (0, 1, 2, 5, len(coded) // 2, len(coded) - 1):
        with pytest.raises(CodingError):
            coder(name).decode(coded[:length], data.size, columns)


def test_ans_with_too_few_lanes_is_refused_before_it_takes_hours() -> None:
    head = bytes([1, 5, 5]) + (1 << 14).to_bytes(2, "little")  # one symbol: no words are read
    coded = head + (1).to_bytes(4, "little") + bytes(4) + (1 << 16).to_bytes(4, "little")
    assert coder("ans").decode(coded, 8192, 1).tolist() == [5] * 8192
    with pytest.raises(CodingError, match="1 lanes for 67108864 bytes"):
        coder("ans").decode(coded, 2**26, 1)


def test_groups_of_rows_without_columns_are_refused() -> None:
    spread = np.exp(RNG.standard_normal((64, 1)) * 1.5)
    rows = np.clip(RNG.standard_normal((64, 700)) * spread * 8, -127, 127).astype(np.int8)
    data = rows.view(np.uint8).reshape(-1)
    coded = coder("ans").encode(data, 700, "fast")
    assert coded[0] > 1
    with pytest.raises(CodingError, match="rows of 0"):
        coder("ans").decode(coded, data.size, 0)


def test_ans_reaches_the_entropy_of_its_groups() -> None:
    codes = np.clip(np.rint(RNG.standard_normal((512, 1024)) * 4), -127, 127).astype(np.int8)
    data = codes.view(np.uint8).reshape(-1)
    coded = coder("ans").encode(data, 1024, "fast")
    assert bits_a_byte(data) < 8 * len(coded) / data.size < 1.01 * bits_a_byte(data)
    scaled = np.clip(codes * np.exp(RNG.standard_normal((512, 1))), -127, 127).astype(np.int8)
    data = scaled.view(np.uint8).reshape(-1)
    assert 8 * len(coder("ans").encode(data, 1024, "fast")) / data.size < bits_a_byte(data)


@pytest.mark.parametrize("kind", ODD)
def test_a_split_float_is_joined_again(kind: str) -> None:
    itemsize = np.dtype(kind).itemsize
    bits = np.array(ODD[kind] * 3, kind)
    streams = split_floats(bits.view(np.uint8), itemsize)
    assert [stream.size for stream in streams] == [bits.size] * itemsize
    assert np.array_equal(join_floats(streams), bits.view(np.uint8))


def test_the_first_stream_of_a_bfloat16_is_its_exponent() -> None:
    values = np.array([0x3F80, 0xBF80, 0x4000], "<u2")  # 1, -1, 2
    first, second = split_floats(values.view(np.uint8), 2)
    assert first.tolist() == [127, 127, 128]
    assert second.tolist() == [0, 1, 0]  # mantissa, then sign


def test_an_unknown_coder_is_named() -> None:
    with pytest.raises(ShortstackError, match="unknown coder 'zstdd'"):
        coder("zstdd")


@pytest.mark.parametrize(
    ("n", "effort", "most"),
    [(2**18, "fast", 0.04), (2**22, "fast", 0.014), (2**18, "best", 0.01), (2**22, "best", 0.008)],
)
def test_lanes_cost_a_hundredth_of_a_bit_where_there_are_many_symbols(
    n: int, effort: str, most: float
) -> None:
    data = np.clip(np.rint(RNG.standard_normal(n) * 4), -127, 127).astype(np.int8).view(np.uint8)
    table_bits = 16 * 64
    coded = 8 * len(coder("ans").encode(data, n, effort)) - table_bits
    assert 0 < coded / n - bits_a_byte(data) < most
