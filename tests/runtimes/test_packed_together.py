"""Matrices that read the same inputs are multiplied as one, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.packed_models import pack, write_coded

from shortstack.checkpoint import Checkpoint
from shortstack.packed.resident import Resident
from shortstack.runtimes import open_session
from shortstack.runtimes.packed import together
from shortstack.runtimes.packed.forms import Slot
from shortstack.runtimes.packed.matrix import Matrix
from shortstack.runtimes.packed.together import Together, groups
from shortstack.runtimes.pytorch_packed import PackedSession

LAYER = "model.layers.0."
QKV = tuple(f"{LAYER}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj"))
GATED = tuple(f"{LAYER}mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
PROMPT = [1, 50, 60, 70, 300, 20, 19]


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    return pack(write_coded(tiny, folder / "coded"), folder / "model.packed.safetensors").path


def opened(path: Path, form: str) -> PackedSession:
    options = {"dtype": "bfloat16", "form": form}
    made = open_session(path, "pytorch-packed", threads=1, context_tokens=64, options=options)
    assert isinstance(made, PackedSession)
    return made


def logits(session: PackedSession) -> np.ndarray:
    """Of a prompt beyond what decoding's kernels take, of a short one, and behind a step."""
    with session:
        long = session.prefill([(7 * i + 3) % 500 for i in range(40)])
        short = session.prefill(PROMPT, all_logits=True)
        return np.concatenate([[long], short, [session.decode(5)]])


@pytest.mark.parametrize("form", ["int8", "direct", "lean"])
def test_together_they_compute_what_they_do_alone(
    packed: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = logits(opened(packed, form))
    monkeypatch.setattr(together, "SIBLINGS", ())
    np.testing.assert_array_equal(ours, logits(opened(packed, form)))


def test_a_layer_has_four_products(packed: Path, tiny: Path) -> None:
    n_layers = Checkpoint.open(tiny).n_layers
    with opened(packed, "int8") as session:
        calls: Counter[str] = Counter()
        for name, matrix in session.packed.matrices.items():
            matrix.multiply = counted(matrix, calls, name)
        session.prefill(PROMPT)
        made = sum(count for name, count in calls.items() if ".layers." in name)
        assert made == len([n for n in calls if ".layers." in n]) == 4 * n_layers
        assert session.packed.members[QKV[0]] == QKV
        assert session.packed.members[GATED[0]] == GATED
        assert len(session.packed.forms) == 7 * n_layers + 1


def counted(matrix: Matrix, calls: Counter[str], name: str):  # type: ignore[no-untyped-def]
    real = matrix.multiply

    def call(x: torch.Tensor) -> torch.Tensor:
        calls[name] += 1
        return real(x)

    return call


def found(packed: Path, forms: dict[str, str], dtype: torch.dtype) -> list[tuple[str, ...]]:
    slots = {name: Slot(name, multiplied=True, head=False) for name in forms}
    return list(groups(slots, forms, Resident(packed), dtype))


def test_only_what_is_alike_is_joined(packed: Path) -> None:
    alike = dict.fromkeys((*QKV, *GATED), "int8")
    assert found(packed, alike, torch.bfloat16) == [QKV, GATED]
    assert found(packed, alike, torch.float32) == [(name,) for name in alike]
    mixed = {**alike, QKV[1]: "direct"}
    assert found(packed, mixed, torch.bfloat16) == [*((name,) for name in QKV), GATED]
    streamed = {**alike, **dict.fromkeys(GATED, "stream")}
    assert found(packed, streamed, torch.bfloat16) == [QKV, *((name,) for name in GATED)]
    without = {name: form for name, form in alike.items() if name != QKV[2]}
    assert found(packed, without, torch.bfloat16) == [(QKV[0],), (QKV[1],), GATED]


def test_what_matrices_share_counts_once(packed: Path) -> None:
    with opened(packed, "direct") as direct, opened(packed, "int8") as int8:
        matrices = direct.packed.matrices.values()
        units = max(matrix.shared["units"] for matrix in matrices)
        entries = max(matrix.shared.get("sixteens", 0) for matrix in matrices)
        assert direct.info["buffer_bytes"] == units + entries > units > 0
        assert int8.info["buffer_bytes"] == 0
        direct.prefill(PROMPT)
        largest = max(matrices, key=lambda matrix: matrix.shared["units"])
        assert largest._scales.nbytes == units


class Doubling(Matrix):
    """Two rows, the first and the last of four inputs, twice."""

    rows, columns, n_bytes = 2, 4, 0

    def __init__(self) -> None:
        self.asked = 0

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return 2 * x[..., [0, 3]]

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no rows are gathered here")


def test_other_inputs_are_multiplied_anew_and_nothing_is_kept() -> None:
    matrix = Doubling()
    both = Together(matrix, (1, 1))
    one, other = torch.arange(4.0), torch.arange(4.0)
    assert both.part(0, one).tolist() == [0.0]
    assert both.part(1, one).tolist() == [6.0]
    assert (both._inputs, both._made, matrix.asked) == (None, None, 1)
    one.add_(1)
    assert both.part(0, one).tolist() == [2.0]
    assert both.part(1, other).tolist() == [6.0]
    assert matrix.asked == 3
