"""The sidecar of codes and steps: written in any order, read back, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from shortstack.checkpoint import SIDECAR
from shortstack.errors import ShortstackError
from shortstack.row_codes import RowCodes, RowCodesReader, RowCodesWriter


def matrix(rows: int, columns: int) -> RowCodes:
    random = np.random.default_rng(rows)
    codes = random.integers(-127, 128, (rows, columns), dtype=np.int8)
    return RowCodes(codes, random.uniform(0.001, 0.01, rows).astype(np.float16))


def test_matrices_come_back_in_whatever_order_they_were_written(tmp_path: Path) -> None:
    wanted = {"b.weight": matrix(3, 5), "a.weight": matrix(7, 4)}
    shapes = {name: (len(m.steps), m.codes.shape[1]) for name, m in wanted.items()}
    with RowCodesWriter(tmp_path, shapes) as writer:
        for name in sorted(wanted):
            writer.write(name, wanted[name])
    reader = RowCodesReader(tmp_path)
    assert reader.shapes == shapes
    for name, one in wanted.items():
        found = reader.read(name)
        assert np.array_equal(found.codes, one.codes)
        assert np.array_equal(found.steps, one.steps)
        assert np.array_equal(load_file(tmp_path / SIDECAR)[f"{name}.steps"].numpy(), one.steps)


def test_a_matrix_that_is_missing_or_of_another_shape_is_a_bug(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"ended before a\.weight"),
        RowCodesWriter(tmp_path, {"a.weight": (3, 5)}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected 3 x 5"),
        RowCodesWriter(tmp_path, {"a.weight": (3, 5)}) as writer,
    ):
        writer.write("a.weight", matrix(3, 4))


def test_a_folder_without_a_sidecar_and_a_cut_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="shortstack quantize"):
        RowCodesReader(tmp_path)
    with RowCodesWriter(tmp_path, {"a.weight": (3, 5)}) as writer:
        writer.write("a.weight", matrix(3, 5))
    file = tmp_path / SIDECAR
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ShortstackError, match="truncated"):
        RowCodesReader(tmp_path)


@pytest.mark.parametrize("step", [np.inf, np.nan, 0.0, -1.0])
def test_steps_that_are_none_are_refused(step: float, tmp_path: Path) -> None:
    """A weight of 1e7 asks for a step beyond float16: infinity times zero would be no weight."""
    one = matrix(3, 5)
    one.steps[1] = step
    with (
        pytest.raises(ShortstackError, match=r"a\.weight has weights that no step of float16"),
        RowCodesWriter(tmp_path, {"a.weight": (3, 5)}) as writer,
    ):
        writer.write("a.weight", one)
