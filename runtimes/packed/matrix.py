"""A matrix of weights as a runtime holds it: multiplied by rows of inputs, or gathered by rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import linear

FEW = {"cpu": 16, "cuda": 8}
"""Inputs that the kernels of decoding take; more are a prompt, for which codes are turned into
numbers first: a product of matrices then costs less than a kernel that unpacks for each row."""

BLOCK_WEIGHTS = {"cpu": 2**22, "cuda": 2**26}
"""Weights of a prompt's product that are numbers at once: 8 MB in bfloat16, on a card 128."""


class Matrix(ABC):
    """Shape (rows, columns), on `device`; inputs and outputs are of type `dtype`.

    `n_bytes`: what it takes while the model runs, without buffers that matrices share.
    """

    buffered = False
    """Whether it is decoded into such buffers."""

    shared: Mapping[str, int] = MappingProxyType({})
    """Bytes of what it shares with others, by what that is: the largest of a model's is there."""

    form: str
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    n_bytes: int

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x, shape (..., columns), times the transposed matrix: (..., rows)."""

    @abstractmethod
    def gather(self, ids: Tensor) -> Tensor:
        """Rows `ids`, shape (n,): (n, columns)."""


def shared_bytes(matrices: Iterable[Matrix]) -> int:
    """What matrices share, each thing as large as the one that needs most of it."""
    most: dict[str, int] = {}
    for matrix in matrices:
        for name, n_bytes in matrix.shared.items():
            most[name] = max(most.get(name, 0), n_bytes)
    return sum(most.values())


@contextmanager
def _whole_sums() -> Iterator[None]:
    """Sums of bfloat16 products in float32 to their end: left alone, cuBLAS may round parts."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


class CodedMatrix(Matrix):
    """codes x steps. `steps`: float32, shape (rows,).

    In float32 the weights are multiplied out, which no rounding touches, and what is computed is
    what nn.Linear does with them: bit for bit that of the unpacked model. In bfloat16 the products
    are summed with the codes, which bfloat16 holds exactly, and the sum is then scaled.
    """

    steps: Tensor

    @abstractmethod
    def codes(self, start: int, stop: int) -> Tensor:
        """int8, shape (stop - start, columns)."""

    @abstractmethod
    def few(self, x: Tensor) -> Tensor:
        """x, shape (m, columns), m at most FEW, times codes x steps: (m, rows), a new tensor."""

    def multiply(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return linear(x, self.weights())
        rows = x.reshape(-1, self.columns)
        made = self.few(rows) if len(rows) <= FEW[self.device.type] else self.many(rows)
        return made.view(*x.shape[:-1], self.rows)

    def weights(self) -> Tensor:
        """The matrix, float32."""
        return self.codes(0, self.rows).float().mul_(self.steps[:, None])

    def many(self, x: Tensor) -> Tensor:
        """As `few`, for any m, by blocks of rows."""
        made = x.new_empty(len(x), self.rows)
        step = max(1, BLOCK_WEIGHTS[self.device.type] // self.columns)
        with _whole_sums():
            for start in range(0, self.rows, step):
                stop = min(self.rows, start + step)
                made[:, start:stop] = x @ self.numbers(start, stop).T
        return made.mul_(self.steps)

    def numbers(self, start: int, stop: int) -> Tensor:
        """The codes of rows in the type of products, (stop - start, columns)."""
        return self.codes(start, stop).to(self.dtype)

    def gather(self, ids: Tensor) -> Tensor:
        return (self.code_rows(ids).float() * self.steps[ids][:, None]).to(self.dtype)

    @abstractmethod
    def code_rows(self, ids: Tensor) -> Tensor:
        """int8, shape (n, columns): the codes of some rows."""
