"""Weights as small integers and one step size a row: what quantizing makes, packing codes and
every unpacking reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.safetensors_header import Head, open_head

CODE_MAX = 127
"""Codes are -127 to 127, so that a row is a legal row of a GGUF Q8_0 tensor and of int8 ONNX."""

STEP_BITS = 16
CODES, STEPS = ".codes", ".steps"
"""Behind a matrix's name: its two tensors in the sidecar."""


@dataclass(frozen=True)
class RowCodes:
    """A matrix of weights, `codes * steps[:, None]`.

    `codes`: int8, shape (rows, columns). `steps`: float16, shape (rows,), positive: GGUF Q8_0 keeps
    its scales in float16, and a float32 holds the product of both exactly.
    """

    codes: NDArray[np.int8]
    steps: NDArray[np.float16]

    def weights(self) -> NDArray[np.float32]:
        """The matrix, float32, shape (rows, columns). No rounding happens here."""
        weights: NDArray[np.float32] = self.codes * self.steps.astype(np.float32)[:, None]
        return weights


class RowCodesWriter:
    """Writes the sidecar of a folder, a matrix at a time and in any order.

    `shapes`: name -> (rows, columns) of every matrix, known in advance: the header comes first.
    The file is safetensors with all steps (F16) before all codes (I8), so that both are aligned.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._shapes = dict(shapes)
        header, self._start, size = _header(self._shapes)
        self._todo = set(self._shapes)
        self._file: BinaryIO = (folder / SIDECAR).open("wb")
        self._file.write(header)
        self._file.truncate(len(header) + size)
        self._base = len(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.close()
        if kind is None and self._todo:
            raise ValueError(f"ended before {min(self._todo)}")

    def write(self, name: str, matrix: RowCodes) -> None:
        """Put one matrix where the header says it is; once."""
        rows, columns = self._shapes[name]
        if matrix.codes.shape != (rows, columns) or matrix.steps.shape != (rows,):
            raise ValueError(f"{name}: expected {rows} x {columns}, got {matrix.codes.shape}")
        if not (np.isfinite(matrix.steps) & (matrix.steps > 0)).all():
            raise ShortstackError(
                f"{name} has weights that no step of float16 reaches with codes to {CODE_MAX}. "
                "Mend the model, or leave it unquantized."
            )
        self._todo.remove(name)
        parts = {
            "steps": np.ascontiguousarray(matrix.steps, "<f2"),
            "codes": np.ascontiguousarray(matrix.codes, np.int8),
        }
        for kind, part in parts.items():
            self._file.seek(self._base + self._start[f"{name}.{kind}"])
            self._file.write(part.data.cast("B"))


def replace_steps(
    folder: Path, shapes: Mapping[str, tuple[int, int]], steps: Mapping[str, NDArray[np.float16]]
) -> None:
    """Give matrices of a sidecar other steps, name -> (rows,), their codes untouched.

    `shapes`: of every matrix, in the order that the file was written with.
    """
    header, starts, _ = _header(shapes)
    with (folder / SIDECAR).open("r+b") as file:
        for name, values in steps.items():
            if values.shape != shapes[name][:1]:
                raise ValueError(f"{name}: expected {shapes[name][0]} steps, got {values.shape}")
            file.seek(len(header) + starts[name + STEPS])
            file.write(np.ascontiguousarray(values, "<f2").data.cast("B"))


class RowCodesReader:
    """Reads the sidecar of a folder by rows; the file is open only while it is read.

    `head`: the file's length and header, as they lie in it. `shapes`: name -> (rows, columns) of
    every matrix.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ShortstackError where there is none, or it is damaged."""
        self.path = folder / SIDECAR
        if not self.path.is_file():
            raise ShortstackError(
                f"{folder} has no {SIDECAR}. Make it with: shortstack quantize MODEL -o OUT"
            )
        self._found = open_head(self.path, "Quantize again.")
        with self.path.open("rb") as file:
            self.head = file.read(self._found.n_bytes)
        self.shapes = self._checked()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The sidecar of a checkpoint; one without matrices where there is none.

        Raises ShortstackError for one that does not belong to the checkpoint.
        """
        if not (checkpoint.path / SIDECAR).is_file():
            empty = cls.__new__(cls)
            empty.path, empty.head, empty.shapes = checkpoint.path / SIDECAR, b"", {}
            empty._found = Head(0, {})
            return empty
        reader = cls(checkpoint.path)
        for name, shape in reader.shapes.items():
            info = checkpoint.tensors.get(name)
            if info is None or (info.dtype, info.shape) != ("F32", shape) or not all(shape):
                raise ShortstackError(
                    f"{reader.path}: {name} does not belong to a float32 matrix of this "
                    "checkpoint. Quantize the model again."
                )
        return reader

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices' names, as in the checkpoint."""
        return tuple(self.shapes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RowCodes:
        """One matrix, or its rows `start` to `stop`."""
        rows, columns = self.shapes[name]
        stop = rows if stop is None else stop
        with self.path.open("rb") as file:
            codes = self._bytes(file, name + CODES, start * columns, (stop - start) * columns)
            steps = self._bytes(file, name + STEPS, 2 * start, 2 * (stop - start))
        return RowCodes(
            np.frombuffer(codes, np.int8).reshape(-1, columns), np.frombuffer(steps, "<f2")
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

    def _bytes(self, file: BinaryIO, part: str, begin: int, length: int) -> bytes:
        file.seek(self._found.at(part) + begin)
        data = file.read(length)
        if len(data) != length:
            raise ShortstackError(f"{self.path} is truncated. Quantize again.")
        return data

    def _checked(self) -> dict[str, tuple[int, int]]:
        """Name -> (rows, columns) of every matrix, codes and steps in agreement."""
        slots = self._found.slots
        found: dict[str, tuple[int, int]] = {}
        for key, slot in slots.items():
            name, _, kind = key.rpartition(".")
            other = slots.get(f"{name}.{'steps' if kind == 'codes' else 'codes'}")
            wanted = {"codes": ("I8", 2), "steps": ("F16", 1)}.get(kind)
            if (
                other is None
                or (slot.dtype, len(slot.shape)) != wanted
                or slot.shape[0] != other.shape[0]
            ):
                raise ShortstackError(
                    f"{self.path}: {key} is not what quantizing writes ({slot.dtype} "
                    f"{list(slot.shape)}). Quantize again."
                )
            if kind == "codes":
                found[name] = (slot.shape[0], slot.shape[1])
        return found


def _header(shapes: Mapping[str, tuple[int, int]]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, where each part starts behind it, and the bytes of all parts."""
    content: dict[str, Any] = {"__metadata__": {"format": "np"}}
    starts: dict[str, int] = {}
    offset = 0
    for kind, dtype, width in (("steps", "F16", 2), ("codes", "I8", 1)):
        for name, (rows, columns) in shapes.items():
            shape = [rows] if kind == "steps" else [rows, columns]
            key, end = f"{name}.{kind}", offset + width * math.prod(shape)
            content[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            starts[key], offset = offset, end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, offset
