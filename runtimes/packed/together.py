"""Matrices that read the same inputs, multiplied as one: a product costs the same few calls, or the
same launch, however many rows it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shortstack.packed.resident import Resident
from shortstack.runtimes.packed.forms import OF_CODES, Slot
from shortstack.runtimes.packed.matrix import Matrix

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules of one layer's attention or MLP that transformers gives the very same inputs, one after
the other."""


def groups(
    slots: Mapping[str, Slot], forms: Mapping[str, str], resident: Resident, dtype: torch.dtype
) -> Iterator[tuple[str, ...]]:
    """Tensors of matrices to be held as one, in the order of their rows; others are alone.

    Only what has row codes and one form is joined. In float32 nothing is: there products are those
    of the unpacked model bit for bit, and a larger one may sum in another order.
    """
    if dtype == torch.float32:
        yield from ((name,) for name in slots)
        return
    taken: set[str] = set()
    for name in slots:
        if name not in taken:
            members = siblings(name)
            found = members if _alike(members, slots, forms, resident) else (name,)
            taken.update(found)
            yield found


def siblings(tensor: str) -> tuple[str, ...]:
    """The tensors that `tensor` may be held together with, itself among them."""
    above, _, last = tensor.removesuffix(".weight").rpartition(".")
    for names in SIBLINGS:
        if last in names:
            return tuple(f"{above}.{name}.weight" for name in names)
    return (tensor,)


def _alike(
    members: tuple[str, ...],
    slots: Mapping[str, Slot],
    forms: Mapping[str, str],
    resident: Resident,
) -> bool:
    if any(name not in slots or name not in resident.coded for name in members):
        return False
    columns = {resident.tensors[name].columns for name in members}
    kinds = {forms[name] for name in members}
    return len(columns) == len(kinds) == 1 and kinds <= set(OF_CODES)


class Together:
    """A matrix whose rows are those of several modules. The first of them multiplies, the others
    take their rows of what it made."""

    def __init__(self, matrix: Matrix, sizes: tuple[int, ...]) -> None:
        self.matrix = matrix
        self._ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        self._inputs: Tensor | None = None
        self._made: Tensor | None = None
        self._left = 0

    def part(self, number: int, x: Tensor) -> Tensor:
        """Rows of module `number`; x, shape (..., columns), is the same object for all of them."""
        if self._inputs is not x or self._made is None:
            self._inputs, self._made = x, self.matrix.multiply(x)
            self._left = len(self._ends)
        end = self._ends[number]
        start = self._ends[number - 1] if number else 0
        made = self._made[..., start:end]
        self._left -= 1
        if not self._left:
            self._inputs = self._made = None  # a prompt's states are not kept
        return made


class PackedPart(nn.Module):
    """y = x W^T + b with W some rows of a matrix."""

    def __init__(self, together: Together, number: int, rows: int, bias: Tensor | None) -> None:
        super().__init__()
        self.together, self.number = together, number
        self.in_features, self.out_features = together.matrix.columns, rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.together.part(self.number, x)
        return made if self.bias is None else made + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features} to {self.out_features}, of one {self.together.matrix.form}"


def put_together(model: Any, matrix: Matrix, tensors: Sequence[str]) -> None:
    """Put parts of `matrix` in the place of the modules that had `tensors`."""
    names = [tensor.removesuffix(".weight") for tensor in tensors]
    modules = [model.get_submodule(name) for name in names]
    together = Together(matrix, tuple(module.out_features for module in modules))
    for number, (name, module) in enumerate(zip(names, modules, strict=True)):
        part = PackedPart(together, number, module.out_features, module.bias)
        model.set_submodule(name, part)
