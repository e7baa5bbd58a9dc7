"""The forms that a matrix can be held in, and which form each is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shortstack.errors import ShortstackError
from shortstack.packed.header import Entry
from shortstack.packed.resident import Resident
from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.matrix import Matrix
from shortstack.runtimes.packed.rest import Scratch
from shortstack.runtimes.packed.stream import Ring

AUTO = "auto"
PLAIN = "plain"
FORMS = ("direct", "lean", "int8", "stream", PLAIN)
"""`plain`: numbers in the session's type, as any model. Matrices without row codes are `plain` or
`stream`."""
OF_FLOATS = ("stream", PLAIN)
OF_CODES = ("direct", "lean", "int8")
DIRECT_BITS = {"cpu": 4.25, "cuda": 4.6}
"""Of a code in the file, above which `auto` takes `int8`: of Gaussian codes of 4.63 bits `direct`
is 0.87 of `int8` on a card, at 4.85 as large; on the CPU at 4.2 0.80 to 0.86, from 4.35 on as
large, and its products take two to four times as long."""


@dataclass(frozen=True)
class Place:
    """Where matrices go and what they compute in."""

    dtype: torch.dtype
    device: torch.device
    ring: Ring
    scratch: Scratch


@dataclass(frozen=True)
class Slot:
    """A matrix of the model: its tensor in the file, and what it is for."""

    tensor: str
    multiplied: bool
    """A table of embeddings that is not the head, too, is gathered from alone."""
    head: bool


def assigned(
    slots: Mapping[str, Slot], resident: Resident, form: str, head: str, on: torch.device
) -> dict[str, str]:
    """Tensor -> form, where `form` and `head` may be AUTO. Raises ShortstackError for a form that
    nothing in the file can have."""
    made = {}
    for name, slot in slots.items():
        wanted = head if slot.head and head != AUTO else form
        coded, entry = name in resident.coded, resident.tensors[name]
        if wanted == AUTO and coded and code_bits(entry) > DIRECT_BITS[on.type]:
            wanted = "int8"
        made[name] = _form(wanted, slot, coded, entry.columns, on)
    if form in OF_CODES and not resident.coded:
        raise ShortstackError(
            f"{resident.path} has no row codes, form={form} needs them. Take form=stream, or "
            "quantize before packing: shortstack quantize MODEL -o OUT"
        )
    return made


def code_bits(entry: Entry) -> float:
    """Bits that a code of a matrix of row codes takes in the file."""
    return 8 * sum(codes for codes, _ in entry.parts) / entry.n_elements


def check_planned(
    forms: Mapping[str, str], slots: Mapping[str, Slot], resident: Resident, on: torch.device
) -> None:
    """Raise ShortstackError for a matrix that cannot have here the form that a plan says."""
    for name, slot in slots.items():
        coded, columns = name in resident.coded, resident.tensors[name].columns
        if _form(forms[name], slot, coded, columns, on) != forms[name]:
            raise ShortstackError(
                f"the plan holds {name} as {forms[name]}, which it cannot be on {on.type}: "
                f"{'its' if coded else 'it has no row codes, its'} width is {columns}. "
                "Make a plan here: shortstack fit-packed MODEL -o plan.json"
            )


def _form(wanted: str, slot: Slot, coded: bool, columns: int, on: torch.device) -> str:
    from shortstack.runtimes.packed.direct import fits

    if not coded:
        return wanted if wanted in OF_FLOATS else PLAIN
    chosen = "direct" if wanted == AUTO else wanted
    able = on.type == "cuda" or fits(columns)
    if chosen == "lean" and on.type == "cuda":
        chosen = "direct"  # is as small there
    if chosen in ("direct", "lean") and not able:
        return "int8"
    return chosen


def make(resident: Resident, tensors: Sequence[str], form: str, place: Place, ring: bool) -> Matrix:
    """Read matrices of the file into a form, as one if there are several: those are of row codes
    and of one width. `ring`: of `stream`, whether it is decoded ahead of its use."""
    if form == "stream":
        return _stream(resident, tensors[0], place, place.ring if ring else None)
    codes = [resident.codes(name) for name in tensors]
    if len(codes) > 1:
        joined = np.concatenate([one.codes for one in codes])
        codes = [RowCodes(joined, np.concatenate([one.steps for one in codes]))]
    return OF_CODES_MAKERS[form](codes[0], place)


def _int8(codes: RowCodes, place: Place) -> Matrix:
    from shortstack.runtimes.packed.int8 import Int8Matrix

    return Int8Matrix(codes, place.dtype, place.device)


def _direct(codes: RowCodes, place: Place) -> Matrix:
    from shortstack.runtimes.packed.card import CardDirectMatrix
    from shortstack.runtimes.packed.direct import CpuDirectMatrix

    if place.device.type == "cuda":
        return CardDirectMatrix(codes, place.dtype, place.device)
    return CpuDirectMatrix(codes, place.dtype)


def _lean(codes: RowCodes, place: Place) -> Matrix:
    from shortstack.runtimes.packed.direct import CpuDirectMatrix

    return CpuDirectMatrix(codes, place.dtype, place.scratch)


def _stream(resident: Resident, tensor: str, place: Place, ring: Ring | None) -> Matrix:
    from shortstack.runtimes.packed.stream import FloatStreamMatrix, StreamMatrix

    if tensor in resident.coded:
        return StreamMatrix(resident.codes(tensor), place.dtype, ring)
    entry = resident.tensors[tensor]
    plain = resident.floats(tensor).reshape(entry.shape[0], -1)
    return FloatStreamMatrix(plain, TORCH_TYPES[entry.dtype], place.dtype, ring)


OF_CODES_MAKERS: Mapping[str, Callable[[RowCodes, Place], Matrix]] = {
    "int8": _int8,
    "direct": _direct,
    "lean": _lean,
}
"""Form -> what makes a matrix of it. `plain` ones stay the model's own (model.py)."""

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
