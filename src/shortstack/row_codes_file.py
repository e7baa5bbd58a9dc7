"""`row_codes.safetensors` beside a checkpoint: codes and steps of its quantized matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.packed.shard_header import Slot, parse_head, read_head
from shortstack.row_codes import RowCodes

Form = tuple[str, tuple[int, ...]]
"""Type and shape."""

CODES, STEPS = ".codes", ".steps"


class RowCodesFile:
    """The sidecar of a checkpoint, read by rows; empty where there is none.

    Raises ShortstackError, when opened, for one that does not belong to the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path / SIDECAR
        self.head, self._slots = b"", dict[str, Slot]()
        if self.path.is_file():
            with self.path.open("rb") as file:
                self.head = read_head(file, self.path)
            self._slots = {slot.name: slot for slot in parse_head(self.head, str(self.path))}
            self._check(checkpoint)
        self.names = frozenset(
            name.removesuffix(CODES) for name in self._slots if name.endswith(CODES)
        )

    def read(self, name: str, start: int, stop: int) -> RowCodes:
        """Rows `start` to `stop` of a matrix."""
        codes, steps = self._slots[name + CODES], self._slots[name + STEPS]
        columns = codes.shape[1]
        with self.path.open("rb") as file:
            plain = self._bytes(file, codes.begin + start * columns, (stop - start) * columns)
            sizes = self._bytes(file, steps.begin + 2 * start, 2 * (stop - start))
        return RowCodes(
            np.frombuffer(plain, np.int8).reshape(-1, columns), np.frombuffer(sizes, "<f2")
        )

    def read_own(self, name: str, start: int, stop: int, weights: NDArray[np.float32]) -> RowCodes:
        """The same rows, held against the `weights` that the checkpoint has of them.

        Raises ShortstackError where they are not codes x steps: the weights were edited.
        """
        rows = self.read(name, start, stop)
        if not np.array_equal(rows.weights(), weights):
            raise self.unlike(name)
        return rows

    def unlike(self, name: str) -> ShortstackError:
        return ShortstackError(
            f"{self.path}: the codes of {name} are not its weights. "
            "Quantize the model again, or remove the file."
        )

    def _bytes(self, file: BinaryIO, begin: int, length: int) -> bytes:
        file.seek(len(self.head) + begin)
        data = file.read(length)
        if len(data) != length:
            raise ShortstackError(f"{self.path} is truncated. Quantize the model again.")
        return data

    def _check(self, checkpoint: Checkpoint) -> None:
        end = max((slot.stop for slot in self._slots.values()), default=0)
        if self.path.stat().st_size != len(self.head) + end:
            raise ShortstackError(f"{self.path} is truncated. Quantize the model again.")
        for name, expected in self._expected(checkpoint):
            slot = self._slots.get(name)
            if slot is None or (slot.dtype, slot.shape) != expected:
                raise ShortstackError(
                    f"{self.path}: {name} does not belong to a float32 matrix of this checkpoint. "
                    "Quantize the model again."
                )

    def _expected(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Form]]:
        for name in self._slots:
            stem = name.removesuffix(CODES).removesuffix(STEPS)
            info = checkpoint.tensors.get(stem)
            if info is None or info.dtype != "F32" or len(info.shape) != 2 or not all(info.shape):
                yield stem, ("", ())
                continue
            yield stem + CODES, ("I8", info.shape)
            yield stem + STEPS, ("F16", info.shape[:1])
