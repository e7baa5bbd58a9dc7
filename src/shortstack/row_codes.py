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

from shortstack.checkpoint import SIDECAR
from shortstack.errors import MissingExtraError, ShortstackError, one_line

CODE_MAX = 127
"""Codes are -127 to 127, so that a row is a legal row of a GGUF Q8_0 tensor and of int8 ONNX."""

STEP_BITS = 16


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
            file.seek(len(header) + starts[f"{name}.steps"])
            file.write(np.ascontiguousarray(values, "<f2").data.cast("B"))


class RowCodesReader:
    """Reads the sidecar of a folder, a matrix at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises ShortstackError where there is none, or it is damaged."""
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise MissingExtraError("safetensors", "prune", "reading row codes") from None
        self.path = folder / SIDECAR
        if not self.path.is_file():
            raise ShortstackError(
                f"{folder} has no {SIDECAR}. Make it with: shortstack quantize MODEL -o OUT"
            )
        try:
            self._file: Any = safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ShortstackError(
                f"{self.path} is truncated or not safetensors ({one_line(str(error))}). "
                "Quantize again."
            ) from None
        self.shapes = self._checked()

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices' names, as in the checkpoint."""
        return tuple(self.shapes)

    def read(self, name: str) -> RowCodes:
        """One matrix."""
        return RowCodes(
            self._file.get_tensor(f"{name}.codes"), self._file.get_tensor(f"{name}.steps")
        )

    def _checked(self) -> dict[str, tuple[int, int]]:
        """Name -> (rows, columns) of every matrix, codes and steps in agreement."""
        slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118
        found: dict[str, tuple[int, int]] = {}
        for key, part in slices.items():
            name, _, kind = key.rpartition(".")
            other = slices.get(f"{name}.{'steps' if kind == 'codes' else 'codes'}")
            wanted = {"codes": ("I8", 2), "steps": ("F16", 1)}.get(kind)
            shape = tuple(part.get_shape())
            if (
                other is None
                or (part.get_dtype(), len(shape)) != wanted
                or shape[0] != other.get_shape()[0]
            ):
                raise ShortstackError(
                    f"{self.path}: {key} is not what quantizing writes ({part.get_dtype()} "
                    f"{list(shape)}). Quantize again."
                )
            if kind == "codes":
                found[name] = (shape[0], shape[1])
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
