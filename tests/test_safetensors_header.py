"""One reader of safetensors heads: what it takes, and what is no whole file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from shortstack.errors import ShortstackError
from shortstack.safetensors_header import open_head


def test_tensors_lie_where_stock_safetensors_finds_them(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.int8),
        "none": np.empty((0, 3), np.float16),
    }
    save_file(wanted, tmp_path / "x.safetensors", {"note": "kept"})
    head, whole = open_head(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").read_bytes()
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as stock:
        assert set(head.slots) == set(stock.keys())
        for name, array in wanted.items():
            slot = head.slots[name]
            assert (slot.dtype, slot.shape) == (stock.get_slice(name).get_dtype(), array.shape)
            assert whole[head.at(name) :][: slot.stop - slot.begin] == array.tobytes()


def info(dtype: str, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [4], "data_offsets": list(offsets)}


DAMAGED: dict[str, dict[str, Any]] = {
    "a gap": {"a": info("I8", 0, 4), "b": info("I8", 5, 9)},
    "an overlap": {"a": info("I8", 0, 4), "b": info("I8", 2, 6)},
    "another size": {"a": info("F16", 0, 4)},
    "an unknown type": {"a": info("F128", 0, 64)},
    "no whole number": {"a": info("I8", 0.0, 4)},
    "an offset missing": {"a": info("I8", 0)},
    "bytes too many": {"a": info("I8", 0, 4)},
    "bytes too few": {"a": info("I8", 0, 4), "b": info("F64", 4, 36)},
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_what_is_no_whole_file_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    text = json.dumps(DAMAGED[fault]).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(9))
    with pytest.raises(ShortstackError, match=r"x\.safetensors is truncated or not saf.*Again\.$"):
        open_head(file, "Again.")


@pytest.mark.parametrize("whole", [b"", b"\xff" * 9, (50).to_bytes(8, "little") + b"{}"])
def test_what_has_no_head_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(whole)
    with pytest.raises(ShortstackError, match="truncated or not safetensors"):
        open_head(tmp_path / "x.safetensors")
