"""What tests of packed models share: checkpoints with a sidecar of row codes, odd bit patterns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from shortstack.checkpoint import SIDECAR, Checkpoint
from shortstack.floats import from_bfloat16
from shortstack.packed.choose import tries
from shortstack.packed.file import PackedFile, write_packed
from shortstack.row_codes import RowCodes

ODD: dict[str, list[int]] = {
    "<u2": [0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F, 0x7C00, 0xFC01],
    "<u4": [0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 1, 0x807FFFFF],
    "<u8": [1 << 63, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, 2**64 - 1, 1],
}
"""Bits of -0, infinities, NaNs with payloads, denormals: of BF16 and F16, F32, F64."""


def row_codes(weights: NDArray[np.float32], sigmas: float = 0.25) -> RowCodes:
    """Round to nearest with a step of so many standard deviations a row."""
    steps = np.maximum(weights.std(1) * sigmas, 1e-4).astype(np.float16)
    codes = np.clip(np.rint(weights / steps.astype(np.float32)[:, None]), -127, 127)
    return RowCodes(codes.astype(np.int8), steps)


def write_coded(source: Path, folder: Path, skip: tuple[str, ...] = ()) -> Checkpoint:
    """A float32 copy of a BF16 or F32 model folder with every matrix as row codes, but `skip`."""
    shutil.copytree(source, folder)
    plain = folder / "model.safetensors"
    tensors: dict[str, Any] = _float32(plain)
    sidecar: dict[str, Any] = {}
    for name, weights in tensors.items():
        if weights.ndim == 2 and not any(part in name for part in skip):
            made = row_codes(weights)
            tensors[name] = made.weights()
            sidecar |= {f"{name}.codes": made.codes, f"{name}.steps": made.steps}
    save_file(tensors, plain, {"format": "pt"})
    save_file(sidecar, folder / SIDECAR)
    return Checkpoint.open(folder)


def _float32(file: Path) -> dict[str, NDArray[np.float32]]:
    import torch
    from safetensors.torch import load_file as load_torch

    found = load_torch(file)
    if any(tensor.dtype != torch.float32 for tensor in found.values()):
        bits = {n: t.to(torch.bfloat16).view(torch.uint16).numpy() for n, t in found.items()}
        return {name: from_bfloat16(array) for name, array in bits.items()}
    return load_file(file)


def pack(checkpoint: Checkpoint, target: Path, coder: str = "auto") -> PackedFile:
    write_packed(checkpoint, target, tries(coder, "matching"))
    return PackedFile(target)
