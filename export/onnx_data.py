"""The data file beside model.onnx, written tensor by tensor: none is held longer than it takes."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from shortstack.disk import disk_errors

INLINE_BYTES = 1024
"""Smaller tensors stay in model.onnx: shape inference wants to see shapes and axes."""
MAPPED_BYTES, PAGE = 1 << 20, 4096
"""onnxruntime maps large tensors instead of reading them; a page apart, they share none."""


def in_rows(array: NDArray[Any]) -> NDArray[Any]:
    """The array in C order. Of a transposed matrix torch makes the copy several times as fast."""
    bits = {2: np.int16, 4: np.int32}.get(array.itemsize)
    if array.flags.c_contiguous or array.ndim != 2 or not array.T.flags.c_contiguous:
        return np.ascontiguousarray(array)
    if bits is None or not array.flags.writeable:  # torch warns of memory that it may not write
        return np.ascontiguousarray(array)
    import torch

    turned = torch.from_numpy(array.T.view(bits)).t().contiguous()
    copied: NDArray[Any] = turned.numpy().view(array.dtype)
    return copied


class DataFile:
    """model.onnx.data: `add` appends an array and gives back the reference to put in the graph."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            self._file = path.open("wb")

    def add(self, name: str, array: NDArray[Any]) -> ir.TensorProtocol:
        if array.nbytes < INLINE_BYTES:
            return ir.tensor(np.array(array), name=name)
        with disk_errors(self._path):
            self._align(PAGE if array.nbytes >= MAPPED_BYTES else 64)
            offset = self._file.tell()
            self._file.write(in_rows(array).data)
        return ir.ExternalTensor(
            self._path.name,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )

    def holds(self, tensor: ir.ExternalTensor) -> bool:
        return Path(tensor.path) == self._path

    def _align(self, to: int) -> None:
        self._file.write(b"\0" * (-self._file.tell() % to))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with disk_errors(self._path):
            self._file.close()
