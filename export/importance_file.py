"""The importance matrix as a file: for libllama in the GGUF layout of llama.cpp's own imatrix tool,
for our own rounding as safetensors.

In GGUF, for a weight matrix NAME, it holds `NAME.in_sum2`, the sum over tokens of each input
channel's square, and `NAME.counts`, the number of tokens (tools/imatrix/imatrix.cpp):
llama-quantize reads it with --imatrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.disk import disk_errors
from shortstack.errors import ShortstackError
from shortstack.export.gguf_write import gguf_package

FILE, CHANNELS = "imatrix.gguf", "imatrix.safetensors"
FLOOR = 1e-6
"""Least weight of a channel against the mean: a block of zeros has no best scale."""

Squares = Mapping[str, tuple[NDArray[np.float64], int]]
"""Name of a matrix -> sums of squares, one an input channel, and the tokens counted."""


def write_importance(path: Path, squares: Squares, n_windows: int, window_tokens: int) -> None:
    writer = gguf_package().GGUFWriter(str(path), "")
    writer.kv_data[0].pop("general.architecture", None)  # llama.cpp's tool writes none
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration text"])
    writer.add_uint32("imatrix.chunk_count", n_windows)
    writer.add_uint32("imatrix.chunk_size", window_tokens)
    for name, (sums, count) in squares.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32)[None, :])
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    with disk_errors(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_importance(path: Path) -> dict[str, NDArray[np.float32]]:
    """Mean square of every input channel, as libllama takes it: name -> (row length,)."""
    tensors = {t.name: np.array(t.data).ravel() for t in gguf_package().GGUFReader(path).tensors}
    found: dict[str, NDArray[np.float32]] = {}
    for name, counts in tensors.items():
        stem, dot, last = name.rpartition(".")
        if dot and last == "counts":
            found[stem] = _usable(stem, tensors[f"{stem}.in_sum2"] / counts[0])
    return found


def write_channels(path: Path, squares: Squares) -> None:
    """Mean square of every input channel, as it was found; needs no package of a format."""
    from safetensors.numpy import save

    means = {name: (sums / count).astype(np.float32) for name, (sums, count) in squares.items()}
    with disk_errors(path):
        path.write_bytes(save(means))


def read_channels(path: Path) -> dict[str, NDArray[np.float32]]:
    """What `write_channels` wrote, as weights to round with: name -> (channels,)."""
    from safetensors.numpy import load

    return {name: _usable(name, mean) for name, mean in load(path.read_bytes()).items()}


def _usable(name: str, mean: NDArray[Any]) -> NDArray[np.float32]:
    if not np.isfinite(mean).all():
        raise ShortstackError(
            f"the inputs of {name} are not finite on the calibration text: the model is "
            "broken, or the cut broke it. Try another cut."
        )
    floor = FLOOR * float(mean.mean(dtype=np.float64)) or 1.0
    usable: NDArray[np.float32] = np.maximum(mean, floor).astype(np.float32)
    return usable
