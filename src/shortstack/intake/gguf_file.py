"""A .gguf file -> a Hugging Face folder: tensors dequantized to fp32, config and tokenizer rebuilt.

Streams rows: memory holds one block of rows, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.families import FAMILIES, Family, TensorRule, dims, expected_tensors
from shortstack.gguf_header import check_vocabulary, read_header
from shortstack.intake import Preview
from shortstack.intake.gguf_config import ROPE_FACTORS, rebuild_config
from shortstack.intake.gguf_tokenizer import write_tokenizer
from shortstack.manifest import finished, staged, step_key, write_manifest
from shortstack.progress import OnProgress, silent
from shortstack.shards import Layout, ShardWriter, lay_out

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

ROWS_BYTES = 2**26
"""Dequantize about this many fp32 bytes at a time."""


def identify(target: str) -> dict[str, Any]:
    """The content hash of the file."""
    with Path(target).open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def open_source(
    target: str, identity: dict[str, Any], work: Path, progress: OnProgress
) -> Checkpoint:
    """Write the file as a folder into `work`, or reopen what an earlier run wrote there."""
    key = step_key("intake", identity)
    if finished(work, key) is None:
        model = GgufModel.open(Path(target))
        with disk_errors(work), staged(work, "intake") as out:
            model.write(out, progress)
            Checkpoint.open(out)
            source = {"file": Path(target).name, **identity}
            write_manifest(out, "intake", key, {"source": source, "dtype": "F32, dequantized"})
    return Checkpoint.open(work)


def preview(target: str) -> Preview | None:
    model = GgufModel.open(Path(target))
    layout = model.layout()
    tensors = {name: info for _, shard in layout.shards for name, info in shard.items()}
    return Preview(Checkpoint(Path(target).parent, model.config, tensors), layout.n_bytes)


class GgufModel:
    """A checked GGUF file: nothing in it is unknown, nothing missing."""

    def __init__(self, file: Path, reader: GGUFReader, fields: dict[str, Any]) -> None:
        self.file, self.fields = file, fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.family = _family(file, fields)
        self.config = rebuild_config(file, fields, self.shapes, self._rope_factors())
        self._plan = list(self._match())

    @classmethod
    def open(cls, file: Path) -> GgufModel:
        """Read the header. Raises ShortstackError for all we cannot turn into a folder exactly."""
        reader = _read(file)
        try:
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except UnicodeDecodeError:
            raise ShortstackError(
                f"{file} is damaged: a string in its metadata is not UTF-8. Download it again."
            ) from None
        return cls(file, reader, fields)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, row-major (GGUF writes the fastest dimension first)."""
        return {n: tuple(int(d) for d in reversed(t.shape)) for n, t in self._tensors.items()}

    def layout(self) -> Layout:
        """The folder's shards: every tensor as fp32."""
        return lay_out((name, "F32", shape) for name, _, _, shape in self._plan)

    def write(self, out: Path, progress: OnProgress = silent) -> None:
        """Write weights, config.json and the tokenizer's files into the folder `out`."""
        layout = self.layout()
        require_space(out, layout.n_bytes)
        source = {name: (tensor, rule) for name, tensor, rule, _ in self._plan}
        sizes = dims(self.config)
        with ShardWriter(out, layout) as writer:
            for done, name in enumerate(writer.names, 1):
                tensor, rule = source[name]
                heads = sizes[rule.rope_heads] if rule.rope_heads else 0
                writer.write(name, (rows.data.cast("B") for rows in _rows_f32(tensor, heads)))
                progress(done, len(source))
        text = json.dumps(self.config, indent=2) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
        write_tokenizer(self.file, self.fields, self.config, out)

    def _match(self) -> Iterator[tuple[str, ReaderTensor, TensorRule, tuple[int, ...]]]:
        seen = {ROPE_FACTORS}
        shapes = self.shapes
        for name, rule, shape, layer in expected_tensors(self.family, dims(self.config)):
            gguf_name = rule.gguf if layer is None else f"blk.{layer}.{rule.gguf}"
            if gguf_name not in shapes:
                if rule.optional or rule is self.family.head:
                    continue
                raise ShortstackError(
                    f"{self.file} has no tensor {gguf_name}. Download the file again."
                )
            if shapes[gguf_name] != shape:
                raise ShortstackError(
                    f"{self.file}: {gguf_name} is {list(shapes[gguf_name])}, its metadata say "
                    f"{list(shape)}. Download the file again."
                )
            seen.add(gguf_name)
            yield name, self._tensors[gguf_name], rule, shape
        extra = sorted(set(shapes) - seen)
        if extra:
            raise ShortstackError(
                f"{self.file}: tensor {extra[0]} is unknown in architecture "
                f"{self.family.gguf_arch!r} ({len(extra)} such). Start from the original folder."
            )

    def _rope_factors(self) -> list[float] | None:
        tensor = self._tensors.get(ROPE_FACTORS)
        return None if tensor is None else [float(x) for x in tensor.data]


def unpermuted_rows(n_rows: int, n_heads: int) -> NDArray[np.int64]:
    """Which GGUF row holds each transformers row of a rotated projection.

    Within a head of size h, llama.cpp rotates the pairs (2i, 2i+1), transformers the pairs
    (i, i + h/2): row (head, half, i) here is row (head, i, half) there.
    """
    import numpy as np

    there = np.arange(n_rows, dtype=np.int64).reshape(n_heads, n_rows // n_heads // 2, 2)
    return there.swapaxes(1, 2).reshape(n_rows)


def _rows_f32(tensor: ReaderTensor, rope_heads: int) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of rows, dequantized and in transformers' order.

    Quantization blocks lie along rows, so rows can be reordered before they are dequantized.
    """
    import numpy as np
    from gguf.quants import dequantize

    n_rows = tensor.data.shape[0]
    order = unpermuted_rows(n_rows, rope_heads) if rope_heads else np.arange(n_rows)
    step = max(1, ROWS_BYTES // (4 * max(1, int(tensor.n_elements) // n_rows)))
    for at in range(0, n_rows, step):
        rows = dequantize(tensor.data[order[at : at + step]], tensor.tensor_type)
        yield np.ascontiguousarray(rows, dtype="<f4")


def _read(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "opening a .gguf file") from None
    check_vocabulary(read_header(file))
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise ShortstackError(
            f"{file} is beyond what the gguf package can read ({one_line(str(error), 120)}). "
            "Update it: pip install -U gguf"
        ) from None
    _check_types(file, reader)
    return reader


def _check_types(file: Path, reader: GGUFReader) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import _type_traits  # the table that `dequantize` looks into

    plain = {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    for tensor in reader.tensors:
        if tensor.tensor_type not in plain and tensor.tensor_type not in _type_traits:
            raise ShortstackError(
                f"{file}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be "
                "dequantized. Start from an F16 or Q8_0 file."
            )


def _family(file: Path, fields: Mapping[str, Any]) -> Family:
    arch = fields.get("general.architecture")
    known = sorted({family.gguf_arch for family in FAMILIES.values()})
    if arch not in known:
        raise ShortstackError(
            f"unknown architecture: {file} is {arch!r}. Supported GGUF architectures: "
            f"{', '.join(known)}."
        )
    # Several model types share one GGUF architecture and so one graph: the first stands for all.
    return next(family for family in FAMILIES.values() if family.gguf_arch == arch)
