"""A rewritten checkpoint differs where it was told to, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.floats import from_stored
from shortstack.prune.rewrite import rewrite
from shortstack.shards import ShardReader

TINY = Path(__file__).parent.parent / "data" / "tiny"
NORM = "model.norm.weight"


def read(checkpoint: Checkpoint, name: str) -> bytes:
    with ShardReader(checkpoint) as reader:
        return b"".join(reader.chunks(name))


def test_only_the_named_tensor_changes(tmp_path: Path) -> None:
    before = Checkpoint.open(TINY)
    info = before.tensors[NORM]
    values = np.full(info.shape, 0.5, np.float32)
    after = rewrite(before, {NORM: values}, tmp_path)
    assert after.config == before.config
    assert after.tensors.keys() == before.tensors.keys()
    for name in before.tensors:
        assert (read(after, name) != read(before, name)) == (name == NORM)
    np.testing.assert_array_equal(from_stored(read(after, NORM), info.dtype), 0.5)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_a_changed_tensor_can_be_stored_wider(tmp_path: Path) -> None:
    before = Checkpoint.open(TINY)
    values = np.full(before.tensors[NORM].shape, 1 / 3, np.float32)
    after = rewrite(before, {NORM: values}, tmp_path, dtype="F32")
    assert after.tensors[NORM].dtype == "F32"
    np.testing.assert_array_equal(from_stored(read(after, NORM), "F32"), np.float32(1 / 3))


@pytest.mark.parametrize(
    ("values", "said"), [(np.full(1, np.nan), "not finite"), (np.zeros(3), "is \\[")]
)
def test_bad_values_are_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    with pytest.raises(ShortstackError, match=said):
        rewrite(Checkpoint.open(TINY), {NORM: values.astype(np.float32)}, tmp_path)
    assert not list(tmp_path.iterdir())
