"""A quantized folder as what the original does not tell: to carry learned codes in few bytes.

    python -m benchmarks.code_deltas restore MODEL FILE -o FOLDER

A code is mostly the one nearest to the original weight: what differs, by one step as a rule, takes
about a bit instead of four. The file is safetensors: of each matrix `NAME.steps` (float16) and
`NAME.delta` (code minus nearest code, int8, coded by the packed format's ANS coder), of norms and
biases `NAME.values` as stored. Restored folders have the very weights, bit for bit.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.floats import from_stored
from shortstack.packed.coders import coder
from shortstack.prune.quantize.matrices import matrix_names
from shortstack.prune.quantize.uniform import nearest_codes
from shortstack.prune.quantize.write import write_folder
from shortstack.row_codes import CODE_MAX, RowCodes, RowCodesReader, RowCodesWriter
from shortstack.shards import ShardReader

EFFORT = "fast"


def stored(checkpoint: Checkpoint, reader: ShardReader, name: str) -> NDArray[np.float32]:
    info = checkpoint.tensors[name]
    raw = b"".join(bytes(chunk) for chunk in reader.chunks(name))
    return from_stored(raw, info.dtype).reshape(info.shape)


def save(original: Checkpoint, folder: Path, file: Path) -> None:
    """Write what `folder`, quantized from `original`, has beyond it."""
    from safetensors.numpy import save_file

    quantized, sidecar = Checkpoint.open(folder), RowCodesReader(folder)
    parts: dict[str, NDArray[np.generic]] = {}
    with ShardReader(original) as before, ShardReader(quantized) as after:
        for name in original.tensors:
            weights = stored(original, before, name)
            if name not in sidecar.shapes:
                if weights.ndim == 1:
                    parts[f"{name}.values"] = stored(quantized, after, name)
                continue
            made = sidecar.read(name)
            nearest = nearest_codes(weights, made.steps.astype(np.float32), CODE_MAX)
            delta = made.codes - nearest  # wraps around in int8, and back
            coded = coder("ans").encode(delta.reshape(-1).view(np.uint8), delta.shape[1], EFFORT)
            parts[f"{name}.steps"], parts[f"{name}.delta"] = (
                made.steps,
                np.frombuffer(coded, np.uint8),
            )
    save_file(parts, file)


def restore(original: Checkpoint, file: Path, out: Path) -> Checkpoint:
    """The folder that `save` was given, made in the new folder `out`."""
    from safetensors.numpy import load_file

    parts = load_file(file)
    names = [name for name in matrix_names(original) if f"{name}.steps" in parts]
    shapes = {name: original.tensors[name].shape for name in names}
    out.mkdir(parents=True)
    with (
        ShardReader(original) as reader,
        RowCodesWriter(
            out, {n: (rows, columns) for n, (rows, columns) in shapes.items()}
        ) as writer,
    ):
        for name in names:
            steps = parts[f"{name}.steps"]
            nearest = nearest_codes(
                stored(original, reader, name), steps.astype(np.float32), CODE_MAX
            )
            coded = parts[f"{name}.delta"].tobytes()
            plain = coder("ans").decode(coded, math.prod(shapes[name]), shapes[name][1])
            writer.write(name, RowCodes(nearest + plain.view(np.int8).reshape(shapes[name]), steps))
    changed = {
        key.removesuffix(".values"): v for key, v in parts.items() if key.endswith(".values")
    }
    return write_folder(original, out, changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("do", choices=("save", "restore"))
    parser.add_argument("model", type=Path)
    parser.add_argument("source", type=Path, help="save: the quantized folder; restore: the file")
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    make = save if asked.do == "save" else restore
    make(Checkpoint.open(asked.model), asked.source, asked.out)


if __name__ == "__main__":
    main()
