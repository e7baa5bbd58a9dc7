"""A checkpoint as a GGUF file of plain floats: metadata, tokenizer, tensors by chunks of rows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.errors import MissingExtraError
from shortstack.export.gguf_arch import ZERO_MLP, Target
from shortstack.export.gguf_chunks import Entry, converted, entry_bytes, kind_of, pieces
from shortstack.export.gguf_meta import add_metadata, rope_tensors
from shortstack.export.gguf_types import PRECISIONS
from shortstack.export.gguf_vocab import add_vocabulary, read_vocabulary
from shortstack.export.weights import Weights
from shortstack.families import TensorRule, expected_tensors
from shortstack.progress import OnProgress


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "the export to GGUF") from None
    return gguf


def entries(checkpoint: Checkpoint) -> list[Entry]:
    """Every tensor of the file but the rotation tables, in order."""
    target, family = Target.of(checkpoint), checkpoint.family
    found = []
    for name, rule, shape, layer in expected_tensors(family, checkpoint.dims):
        if name not in checkpoint.tensors:
            continue
        gguf_name = rule.gguf if layer is None else f"blk.{layer}.{rule.gguf}"
        if layer in target.no_attention and rule.gguf.startswith("attn_"):
            continue
        if layer in target.no_mlp and rule.part == "mlp":
            if rule.gguf.endswith(".weight"):
                found.append(Entry(gguf_name, _narrow(rule, shape), None, rule))
            continue
        found.append(Entry(gguf_name, shape, name, rule, _scale(target, family.layer, rule)))
    return found


def _narrow(rule: TensorRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(
        ZERO_MLP if symbol == "ff" else n for symbol, n in zip(rule.shape, shape, strict=True)
    )


def _scale(target: Target, layer: tuple[TensorRule, ...], rule: TensorRule) -> float:
    """Where the attention scale is mended: in the norm of the queries, else in their weights."""
    has_norm = any(r.gguf == "attn_q_norm.weight" for r in layer)
    mended = ("attn_q_norm.weight",) if has_norm else ("attn_q.weight", "attn_q.bias")
    return target.query_scale if rule.gguf in mended else 1.0


def write_floats(
    checkpoint: Checkpoint,
    target: Path,
    kind: str | None,
    progress: OnProgress,
    digest: hashlib._Hash | None = None,
    blocks: Collection[str] = (),
) -> None:
    """Write a file of plain floats by chunks of rows; `kind` None keeps the stored types.

    `blocks` names tensors that are written as Q8_0 instead, and makes the file one of that type.

    `digest` is fed with the whole file while it is written, which spares reading it again.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(str(target), Target.of(checkpoint).arch.name)
    file_type = PRECISIONS["Q8_0" if blocks else kind or "F32"].file_type
    name = Path(str(checkpoint.config.get("_name_or_path") or checkpoint.path)).name
    add_metadata(writer, checkpoint, name, file_type)
    add_vocabulary(writer, read_vocabulary(checkpoint.path, checkpoint.dims["vocab"]))
    if blocks:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    plan = [
        (entry, "Q8_0" if entry.name in blocks else kind_of(checkpoint, entry, kind))
        for entry in entries(checkpoint)
    ]
    tables = rope_tensors(checkpoint)
    for table_name, table in tables.items():
        writer.add_tensor_info(table_name, table.shape, table.dtype, table.nbytes)
    for entry, stored in plan:
        n_bytes, raw = entry_bytes(entry, stored), gguf.GGMLQuantizationType[stored]
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), n_bytes, raw_dtype=raw
        )
    with disk_errors(target), _closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for table in tables.values():
            writer.write_tensor_data(table)
        (stream,) = writer.fout
        stream.flush()
        if digest is not None:
            digest.update(target.read_bytes())  # the head: a few MB
        todo = (piece for entry, kind in plan for piece in pieces(checkpoint, entry, kind))
        done = 0
        with _appending(stream, digest, writer.data_alignment) as append:
            for piece, data in converted(Weights(checkpoint), todo):
                append(data.data, piece.is_last)
                done += piece.is_last
                progress(done, len(plan))


@contextlib.contextmanager
def _appending(
    stream: BinaryIO, digest: hashlib._Hash | None, alignment: int
) -> Iterator[Callable[[memoryview, bool], None]]:
    """Yield a function that writes bytes, hashes them meanwhile, and pads after a tensor's last."""
    with ThreadPoolExecutor(1) as hashing:

        def append(data: memoryview, is_last: bool) -> None:
            hashed = hashing.submit(digest.update, data) if digest is not None else None
            at = stream.tell() + stream.write(data)
            if hashed is not None:
                hashed.result()
            if is_last and at % alignment:
                append(memoryview(bytes(-at % alignment)), False)

        append(memoryview(b""), True)
        yield append


@contextlib.contextmanager
def _closing(writer: Any) -> Iterator[None]:
    """Close the files; a failure to flush counts only if nothing failed before."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()
        raise
    writer.close()
