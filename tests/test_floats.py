"""bfloat16 to float16 by integer arithmetic gives what rounding through float32 gives."""

from __future__ import annotations

import numpy as np
import pytest

from shortstack.floats import F16_MAX, bfloat16_to_float16, from_bfloat16

EVERY = np.arange(2**16, dtype=np.uint16)


def test_every_bfloat16_that_float16_holds_becomes_what_numpy_makes_of_it() -> None:
    values = from_bfloat16(EVERY)
    held = EVERY[np.isnan(values) | (np.abs(values) <= F16_MAX)]
    expected = from_bfloat16(held).astype(np.float16).view(np.uint16)
    bits = held.copy()
    bfloat16_to_float16(bits)
    assert held.size > 2**15
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("bits", [0x4780, 0xC780, 0x7F80])
def test_a_bfloat16_beyond_float16_is_refused(bits: int) -> None:
    with pytest.raises(OverflowError):
        bfloat16_to_float16(np.array([0x3F80, bits], np.uint16))
