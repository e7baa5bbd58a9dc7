from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from shortstack.shards import ShardWriter, lay_out

TENSORS = [("a", "F16", (3,)), ("b", "F32", (2, 2)), ("c", "F16", (5,))]


def test_safetensors_reads_what_was_written_and_the_size_was_known(tmp_path: Path) -> None:
    layout = lay_out(TENSORS)
    values: dict[str, Any] = {
        "a": np.arange(3, dtype=np.float16),
        "b": np.arange(4, dtype=np.float32).reshape(2, 2),
        "c": np.arange(5, dtype=np.float16),
    }
    with ShardWriter(tmp_path, layout) as writer:
        assert writer.names == ["b", "a", "c"]  # wide types first: all stay aligned
        for name in writer.names:
            writer.write(name, [values[name].tobytes()])
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == layout.n_bytes
    for name, array in load_file(file).items():
        assert np.array_equal(array, values[name])


def test_a_shard_holds_no_more_than_its_limit_unless_one_tensor_does() -> None:
    layout = lay_out(TENSORS, max_bytes=16)
    assert [sorted(part) for _, part in layout.shards] == [["a"], ["b"], ["c"]]
    assert layout.index is not None
    assert len(lay_out(TENSORS, max_bytes=1).shards) == 3


def test_the_writer_says_what_it_expected(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="expected tensor b, got a"),
        ShardWriter(tmp_path, lay_out(TENSORS)) as writer,
    ):
        writer.write("a", [b"123456"])
    with (
        pytest.raises(ValueError, match="b: expected 16 bytes, got 6"),
        ShardWriter(tmp_path, lay_out(TENSORS)) as writer,
    ):
        writer.write("b", [b"123456"])
    with (
        pytest.raises(ValueError, match="ended before tensor b"),
        ShardWriter(tmp_path, lay_out(TENSORS)),
    ):
        pass
