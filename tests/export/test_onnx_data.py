"""The data file of an ONNX export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shortstack.export.onnx_data import DataFile, in_rows


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (64, 1), (1, 7)])
def test_a_turned_matrix_is_written_row_by_row(
    kind: type[np.generic], shape: tuple[int, int], tmp_path: Path
) -> None:
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(kind)
    for given in (matrix, matrix.T, matrix[:, ::2], matrix[::-1].T):
        assert in_rows(given).tobytes() == given.tobytes()  # numpy's bytes are in C order
        assert in_rows(given).flags.c_contiguous
    read_only = matrix.T
    read_only.flags.writeable = False
    assert in_rows(read_only).tobytes() == read_only.tobytes()


def test_a_turned_matrix_comes_back_from_the_file(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float16)
    with DataFile(tmp_path / "data") as data:
        stored = data.add("turned", matrix.T)
    assert np.array_equal(stored.numpy(), matrix.T)
