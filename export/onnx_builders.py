"""The builders of ONNX graphs, one contract: a float32 decoder with KV cache, as the config says.

What differs between them ends here: attention per layer, removed sub-blocks, quantization and
files are ours and the same for all (onnx_make.py).
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, require
from shortstack.families import rope_parameters

if TYPE_CHECKING:
    import onnx_ir as ir

BUILDERS: dict[str, str] = {
    "mobius": "shortstack.export.onnx_mobius",
    "genai": "shortstack.export.onnx_genai",
    "optimum": "shortstack.export.onnx_optimum",
}
"""Name -> module, in the order in which `auto` tries them. mobius is first: it supports every
family and leaves the weights in their files: 7 B parameters become int4 in 1.2 GB of memory, where
genai's needs gigabytes and a float32 copy on the disk. Its graphs are as fast: see
benchmarks/onnx_int4.py. optimum lives in an environment of its own."""

AUTO = "auto"


class Builder(Protocol):
    """What a module in BUILDERS offers."""

    PACKAGES: tuple[str, ...]
    EXTRA: str

    def unsupported(self, checkpoint: Checkpoint) -> str | None:
        """Why it cannot build this checkpoint, as measured; None if it can."""

    def peak_ram_bytes(self, checkpoint: Checkpoint) -> int:
        """Most anonymous memory of `build`."""
        ...

    def disk_bytes(self, checkpoint: Checkpoint) -> int:
        """Most of what `build` writes into `scratch`."""
        ...

    def build(self, checkpoint: Checkpoint, scratch: Path) -> ir.Model:
        """In a child: a float32 graph; its tensors may be read as late as when they are written."""
        ...


def choose(checkpoint: Checkpoint, wanted: str) -> tuple[str, Builder]:
    """The builder of a name, or for `auto` the first that is installed and can.

    Raises MissingExtraError for one that is not installed, ShortstackError for one that cannot.
    """
    if wanted != AUTO:
        found = _module(wanted)
        require(found.PACKAGES, found.EXTRA, f"the {wanted} builder")
        reason = found.unsupported(checkpoint)
        if reason is not None:
            others = [name for name in BUILDERS if name != wanted]
            raise ShortstackError(
                f"{reason}. Try another builder: --option builder={' or '.join(others)}"
            )
        return wanted, found
    reasons = []
    for name in BUILDERS:
        found = _module(name)
        if any(find_spec(package) is None for package in found.PACKAGES):
            continue
        reason = found.unsupported(checkpoint)
        if reason is None:
            return name, found
        reasons.append(reason)
    if not reasons:
        first = _module(next(iter(BUILDERS)))
        require(first.PACKAGES, first.EXTRA, "the export to ONNX")
    raise ShortstackError(f"no builder makes this model: {'; '.join(reasons)}. Export to gguf.")


def ungroupable(checkpoint: Checkpoint) -> str | None:
    """Why GroupQueryAttention, which some builders' graphs are made of, cannot compute a model.

    onnxruntime 1.31 opens such a graph and fails at the first token.
    """
    width = checkpoint.dims["head_dim"]
    rotation = rope_parameters(checkpoint.text)
    share = rotation.get("partial_rotary_factor") or checkpoint.text.get("partial_rotary_factor")
    rotated = int(width * float(share or 1))
    for name, size in (("heads", width), ("rotations", rotated)):
        if size % 16:
            return f"onnxruntime's GroupQueryAttention has {name} in sixteens, not of {size}"
    return None


def _module(name: str) -> Builder:
    return cast(Builder, importlib.import_module(BUILDERS[name]))
