"""Every form holds the very codes, and a plan is fitted to what they cost."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.packed_models import pack, write_coded
from torch.nn.functional import linear

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.packed.plan_file import read_plan
from shortstack.packed.resident import Resident
from shortstack.row_codes import RowCodes
from shortstack.runtimes import open_session
from shortstack.runtimes.packed import direct, forms
from shortstack.runtimes.packed.card import CardDirectMatrix
from shortstack.runtimes.packed.direct import CpuDirectMatrix
from shortstack.runtimes.packed.fit import fit
from shortstack.runtimes.packed.forms import Slot, assigned, code_bits
from shortstack.runtimes.packed.int8 import Int8Matrix
from shortstack.runtimes.packed.matrix import CodedMatrix
from shortstack.runtimes.packed.measuring import Setting
from shortstack.runtimes.packed.nibbles import split
from shortstack.runtimes.packed.rest import Scratch
from shortstack.runtimes.packed.stream import Ring, StreamMatrix

CPU = torch.device("cpu")


def codes(rows: int, columns: int) -> RowCodes:
    """Rows of unlike spread; row 1 has every code, row 2 the largest alone, row 3 none."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(1, 9, (rows, 1))
    made = np.clip(np.rint(rng.normal(0, spread, (rows, columns))), -127, 127)
    made[1], made[2], made[3] = rng.integers(-127, 128, columns), 127, 0
    return RowCodes(made.astype(np.int8), rng.uniform(0.01, 0.02, rows).astype(np.float16))


def held(form: str, made: RowCodes, dtype: torch.dtype) -> CodedMatrix:
    if form == "stream":
        ring = Ring(0)
        matrix = StreamMatrix(made, dtype, ring)
        ring.start()
        return matrix
    if form == "card":
        return CardDirectMatrix(made, dtype, CPU)
    if form == "int8":
        return Int8Matrix(made, dtype, CPU)
    return CpuDirectMatrix(made, dtype, Scratch() if form == "lean" else None)


@pytest.mark.parametrize("form", ["int8", "direct", "lean", "stream", "card"])
@pytest.mark.parametrize(("rows", "columns"), [(200, 96), (70, 9216), (64, 64)])
def test_every_form_holds_the_very_codes(form: str, rows: int, columns: int) -> None:
    made = codes(rows, columns)
    weights = torch.from_numpy(made.weights())
    with torch.inference_mode():
        exact = held(form, made, torch.float32)
        assert torch.equal(exact.codes(0, rows), torch.from_numpy(made.codes))
        ids = torch.tensor([3, rows - 1, 0, 1])
        assert torch.equal(exact.gather(ids), weights[ids])
        rough = held(form, made, torch.bfloat16)
        for m in (1, 3, 40):
            x = torch.randn(m, columns)
            assert torch.equal(exact.multiply(x), linear(x, weights))
            x = x.bfloat16()
            found = rough.multiply(x)
            assert found.stride(-1) == 1  # as nn.Linear's: attention's rounding depends on it
            error = (found.float() - linear(x.float(), weights)).norm()
            assert error < 0.01 * linear(x.float(), weights).norm()


@pytest.mark.parametrize(("rows", "columns"), [(6, 16389), (5000, 13)])
def test_rows_of_any_width_are_packed_for_a_card(rows: int, columns: int) -> None:
    """Of more than one block of entries, of no whole words, and more than are packed at once."""
    made = codes(rows, columns)
    held = CardDirectMatrix(made, torch.float32, CPU)
    wanted = torch.from_numpy(made.codes)
    assert torch.equal(held.codes(0, rows), wanted)
    assert torch.equal(held.codes(2, rows - 1), wanted[2:-1])
    ids = torch.tensor([rows - 1, 1, 3, 1])
    assert torch.equal(held.code_rows(ids), wanted[ids])


def test_words_hold_their_nibbles_where_the_kernel_of_a_card_looks_for_them() -> None:
    made = codes(7, 44)
    held = CardDirectMatrix(made, torch.float32, CPU)
    words = held.arguments(torch.zeros(1, 44), torch.zeros(1, 7))[1]
    assert isinstance(words, torch.Tensor)
    assert words.shape == (7, 6)
    bits = words.numpy().view(np.uint32)
    parts = (bits, bits >> 8, bits >> 16 | bits << 16, bits << 8)
    pairs = [np.stack([part >> 15 & 15, part >> 19 & 15], 2) for part in parts]
    nibbles = np.concatenate([pair.reshape(7, -1) for pair in pairs], 1)[:, :44]
    assert (nibbles == (made.codes.astype(int) + 8) % 16).all()


def test_entries_come_in_eights_with_neighbours_in_neighbouring_ones() -> None:
    made = np.zeros((2, 100), np.int8)
    made[0, :17] = 16  # an entry each of h = 1: 3 eights, the last 7 of which are empty
    made[1, 99] = 40  # -8 + 48: 3 entries
    held = CardDirectMatrix(RowCodes(made, np.ones(2, np.float16)), torch.float32, CPU)
    assert held._starts.tolist() == [0, 3, 4]
    h, column = held._entries >> 14, held._entries & 0x3FFF
    assert column.view(4, 8)[0].tolist() == [0, 3, 6, 9, 12, 15, 0, 0]
    assert column.view(4, 8)[2].tolist() == [2, 5, 8, 11, 14, 0, 0, 0]
    assert column[24:27].tolist() == [99] * 3
    assert h.view(4, 8).sum(1).tolist() == [6, 6, 5, 3]


def test_nibbles_are_laid_out_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nibbles = np.random.default_rng(0).integers(-8, 8, (300, 96)).astype(np.int8)
    whole, rows = direct.pack(nibbles)
    filled = np.full((rows, 96), 8, np.int32)
    filled[:300] += nibbles
    kernels = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(filled), 1)
    assert torch.equal(whole, kernels)
    monkeypatch.setattr(direct, "PACKED_AT_ONCE", 2 * direct.TILE)
    assert torch.equal(direct.pack(nibbles)[0], whole)


@pytest.mark.parametrize("widest", [0.0, 0.05, 1.0])
def test_nibbles_and_what_is_left_over_are_the_codes(widest: float) -> None:
    made = codes(50, 300)
    parts = split(made.codes, widest)
    assert (parts.codes() == made.codes).all()
    assert parts.low.min() >= -8
    assert parts.low.max() <= 7


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    return pack(write_coded(tiny, folder / "folder"), folder / "model.packed.safetensors").path


def test_a_fitted_plan_is_what_a_session_then_holds(packed: Path, tmp_path: Path) -> None:
    setting = Setting(packed, threads=1, workers="0")
    plan = fit(setting, memory_budget_mb=0.24, max_slowdown=None, points=0)
    assert plan.chosen.n_bytes <= 240_000 < plan.int8_bytes
    assert plan.chosen.measured_s is not None
    file = tmp_path / "plan.json"
    file.write_text(plan.model_dump_json())
    assert read_plan(file) == plan
    options = {"plan": str(file), "workers": "0"}
    with open_session(
        packed, "pytorch-packed", threads=1, context_tokens=64, options=options
    ) as session:
        assert session.info["forms"] == plan.chosen.forms
        assert session.info["weight_bytes"] <= 240_000
    with pytest.raises(ShortstackError, match=r"no plan takes at most 0\.0 MB: the least is 0\.\d"):
        fit(setting, memory_budget_mb=0.01, max_slowdown=None, points=0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_direct_is_not_taken_where_it_is_larger_than_int8(
    packed: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    resident, on = Resident(packed), torch.device(kind)
    slots = {name: Slot(name, multiplied=True, head=False) for name in resident.coded}
    bits = {name: code_bits(resident.tensors[name]) for name in slots}
    name = max(bits, key=lambda one: bits[one])
    coded = resident.codes(name).codes
    counts = np.unique(coded, return_counts=True)[1] / coded.size
    entropy = float(-(counts * np.log2(counts)).sum())
    assert entropy - 0.5 < bits[name] < 1.15 * entropy + 0.1
    monkeypatch.setitem(forms.DIRECT_BITS, kind, bits[name] - 1e-6)
    assert assigned(slots, resident, "auto", "auto", on)[name] == "int8"
    assert assigned(slots, resident, "direct", "auto", on)[name] == "direct"
    monkeypatch.setitem(forms.DIRECT_BITS, kind, bits[name])
    assert set(assigned(slots, resident, "auto", "auto", on).values()) == {"direct"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_codes_of_five_bits_are_smaller_as_int8(kind: str) -> None:
    """And those of the limits are not."""
    rng = np.random.default_rng(0)

    def over_int8(bits: float) -> float:
        spread = 2**bits / np.sqrt(2 * np.pi * np.e)  # of a Gaussian with that entropy, in steps
        drawn = np.clip(np.rint(rng.normal(0, spread, (256, 1024))), -127, 127)
        made = RowCodes(drawn.astype(np.int8), np.ones(256, np.float16))
        held = CpuDirectMatrix if kind == "cpu" else partial(CardDirectMatrix, device=CPU)
        return held(made, torch.bfloat16).n_bytes / Int8Matrix(made, torch.bfloat16, CPU).n_bytes

    assert over_int8(5) > 1 > over_int8(forms.DIRECT_BITS[kind])


def test_without_codes_there_is_nothing_to_fit(tiny: Path, tmp_path: Path) -> None:
    path = pack(Checkpoint.open(tiny), tmp_path / "model.packed.safetensors").path
    with pytest.raises(ShortstackError, match="has no row codes"):
        fit(Setting(path, threads=1), memory_budget_mb=1, max_slowdown=None, points=0)


@pytest.mark.parametrize("budget", ["0.24", "1"])
def test_a_sessions_budget_may_be_a_part_of_a_megabyte(packed: Path, budget: str) -> None:
    options = {"memory_budget_mb": budget, "workers": "0"}
    with open_session(
        packed, "pytorch-packed", threads=1, context_tokens=64, options=options
    ) as session:
        assert session.info["weight_bytes"] <= float(budget) * 1e6


def test_a_budget_that_is_no_number_is_refused(packed: Path) -> None:
    for word in ("-1", "1e3", "1.", "inf", "nan"):
        with pytest.raises(ShortstackError, match=f"memory_budget_mb is '{word}'"):
            open_session(
                packed,
                *("pytorch-packed",),
                threads=1,
                context_tokens=64,
                options={"memory_budget_mb": word},
            )
