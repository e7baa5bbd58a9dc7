"""What `bench` measures: an artifact we made, or a model file or folder of anybody's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from shortstack.artifact import Artifact, ExportSpec
from shortstack.checkpoint import Checkpoint, hash_digests, hash_file, hash_files
from shortstack.commands.stages import open_artifact
from shortstack.devices.fit import DTYPE_BYTES, QUANTIZED_BYTES
from shortstack.errors import ShortstackError, require
from shortstack.exits import config_at, read_exits, split_depth
from shortstack.families import context_tokens
from shortstack.gguf_header import GGML_TYPES, GgufHeader, read_header
from shortstack.intake import is_packed, resolve
from shortstack.manifest import read_manifest
from shortstack.multiplied import EMBEDDING, experts_in_use, of_checkpoint, of_gguf
from shortstack.packed.read import open_packed
from shortstack.packed.runnable import check_runnable, preview_of

CHECKPOINT = "checkpoint"
PACKED = "packed"
FOREIGN = "not made by shortstack: its checkpoint is not known"


def benchable(reference: str, dtype: str = "float32", quantize: str = "none") -> Artifact:
    """Find out what a reference names: folder, .gguf file, or `pkg:PACKAGE/PATH`.

    `dtype`: what a Hugging Face folder is computed in, `quantize`: what its linear layers become
    (both of pytorch). Raises ShortstackError where there is no model, and for an artifact of ours
    that was changed.
    """
    folder, depth = split_depth(Path(reference))
    if depth is not None:
        return _exit(folder, depth, dtype, quantize)
    kind, target = resolve(reference)
    if kind == "hub":
        raise ShortstackError(
            f"{reference} is to be downloaded first. Download it with: hf download {target}, then "
            "name its folder."
        )
    found = _found(Path(target), reference, dtype, quantize)
    if found.format == PACKED:
        check_runnable()
    return _multiplied(_sound(found))


def _sound(artifact: Artifact) -> Artifact:
    """A record of less than this is refused when it is read, so it is not measured either."""
    for name in ("n_layers", "size_bytes", "weight_bytes_per_token"):
        if getattr(artifact, name) < 1:
            raise ShortstackError(
                f"{artifact.path} is no decoder that can be measured: its {name} is "
                f"{getattr(artifact, name)}. Export it again, with its KV cache."
            )
    return artifact


def _multiplied(artifact: Artifact) -> Artifact:
    """Files of other tools and of older versions do not say what they multiply: it is counted."""
    if artifact.matmul_params is not None or artifact.format == CHECKPOINT:
        return artifact
    if artifact.format == "gguf":
        found = of_gguf(read_header(artifact.path))
    elif artifact.format == PACKED:
        found = of_checkpoint(preview_of(artifact.path))
    else:
        require(("onnx_ir",), "onnx", "reading an ONNX graph")
        from shortstack.export.onnx_graph import multiplied_params

        found = multiplied_params(artifact.path / "model.onnx")
    return dataclasses.replace(
        artifact, matmul_params=found.matmul_params, head_params=found.head_params
    )


def _found(place: Path, reference: str, dtype: str, quantize: str) -> Artifact:
    if place.is_file():
        beside = (read_manifest(place.parent) or {}).get("artifact")
        if isinstance(beside, dict) and beside.get("path") == place.name:
            return open_artifact(place.parent)
        return _packed(place) if is_packed(place) else _gguf(place)
    if "artifact" in (read_manifest(place) or {}):
        return open_artifact(place)
    if (place / "model.onnx").is_file():
        return _onnx(place)
    if (place / "config.json").is_file():
        return _checkpoint(place, dtype, quantize)
    inside = sorted(place.glob("*.gguf"))
    if len(inside) == 1:
        return _gguf(inside[0])
    raise ShortstackError(
        f"{place} is no model: neither a Hugging Face folder, a .gguf file, a folder with "
        "model.onnx, nor the folder of an export. Mend the path."
    )


def longest_context(artifact: Artifact) -> int | None:
    """How many tokens the model was made for; None where it does not say."""
    path = artifact.path
    if artifact.format == PACKED:
        return context_tokens(preview_of(path).config, windowed=True)
    if artifact.format == "gguf":
        header = read_header(path)
        return header.integer(f"{header.text('general.architecture')}.context_length") or None
    genai, config = path / "genai_config.json", path / "config.json"
    if artifact.format == "onnx" and genai.is_file():
        model = _read_json(genai).get("model")
        length = model.get("context_length") if isinstance(model, dict) else None
        return length if isinstance(length, int) else None
    if split_depth(path)[1] is not None:
        return context_tokens(config_at(path), windowed=True)
    if not config.is_file():
        return None
    return context_tokens(_read_json(config), windowed=artifact.format == CHECKPOINT)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ShortstackError(f"{file} cannot be read: {error}. Export the model again.") from None
    if not isinstance(data, dict):
        raise ShortstackError(f"{file} is no JSON object. Export the model again.")
    return data


def _exit(folder: Path, depth: int, dtype: str, quantize: str) -> Artifact:
    """A depth of a model with exits, as the runtime opens it: the whole one, or an exit's."""
    from shortstack.prune.exits.cut import exit_cut

    exits = read_exits(folder)
    exits.check_depth(depth)
    base = exits.open_base()
    if depth == exits.n_layers:
        found = _of_headers(base, base.sha256, dtype, quantize)
    else:
        shown = exit_cut(base, exits, depth).checkpoint(base, exits, depth)
        identity = [("base", base.sha256), ("exits", exits.sha256), ("depth", str(depth))]
        found = _of_headers(shown, hash_digests(identity), dtype, quantize)
    return dataclasses.replace(
        found, path=folder.with_name(f"{folder.name}@{depth}"), source_sha256=base.sha256
    )


def _checkpoint(place: Path, dtype: str, quantize: str) -> Artifact:
    checkpoint = Checkpoint.open(place)
    return _of_headers(checkpoint, checkpoint.sha256, dtype, quantize)


def _of_headers(checkpoint: Checkpoint, sha256: str, dtype: str, quantize: str) -> Artifact:
    """A folder is read into memory as `dtype`, so that is what a token reads. Quantized, its bytes
    are an estimate, until a session has loaded it (devices/harness.py)."""
    own = _decoder_shapes(checkpoint)
    if not checkpoint.tied:
        own = {name: shape for name, shape in own.items() if not name.endswith(EMBEDDING)}
    read = sum(map(math.prod, own.values()))
    multiplied = of_checkpoint(checkpoint)
    width, saved = DTYPE_BYTES[dtype], 0
    if quantize != "none":
        saved = round((width - QUANTIZED_BYTES[quantize]) * (multiplied.matmul_params or 0))
    return Artifact(
        path=checkpoint.path,
        spec=ExportSpec(CHECKPOINT, dtype if quantize == "none" else quantize),
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=checkpoint.n_params * width - saved if saved else checkpoint.n_bytes,
        weight_bytes_per_token=read * width - saved,
        sha256=sha256,
        source_sha256=sha256,
        matmul_params=multiplied.matmul_params,
        head_params=multiplied.head_params,
    )


def _decoder_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Tensors that a token of text may read: not those of a vision tower."""
    tensors, towers = checkpoint.tensors.items(), checkpoint.family.others
    return {name: t.shape for name, t in tensors if not name.startswith(towers)}


def _packed(file: Path) -> Artifact:
    """Bytes a token are those of the file, until a session says what its forms read."""
    checkpoint = preview_of(file)
    size = sum(entry.coded_bytes for entry in open_packed(file).contents.entries)
    sha256 = hash_digests([(file.name, hash_file(file))])
    return Artifact(
        path=file,
        spec=ExportSpec(PACKED, "lossless"),
        n_layers=checkpoint.n_layers,
        n_params=checkpoint.n_params,
        size_bytes=size,
        weight_bytes_per_token=size,
        sha256=sha256,
        source_sha256=sha256,
        notes=(FOREIGN,),
    )


def _gguf(file: Path) -> Artifact:
    header = read_header(file)
    arch = header.text("general.architecture")
    sha256 = hash_digests([(file.name, hash_file(file))])
    return Artifact(
        path=file,
        spec=ExportSpec("gguf", _precision(header)),
        n_layers=header.integer(f"{arch}.block_count"),
        n_params=sum(math.prod(tensor.dims) for tensor in header.tensors),
        size_bytes=header.n_bytes,
        weight_bytes_per_token=_gguf_bytes_per_token(header),
        sha256=sha256,
        source_sha256=sha256,
        notes=(FOREIGN,),
    )


def _gguf_bytes_per_token(header: GgufHeader) -> int:
    """Every tensor; the token table only where it is also the head; of experts those in use."""
    untied = any(tensor.name == "output.weight" for tensor in header.tensors)
    used = experts_in_use(header)
    total = 0.0
    for tensor in header.tensors:
        if not (untied and tensor.name == "token_embd.weight"):
            total += tensor.n_bytes * (used if "_exps" in tensor.name else 1.0)
    return round(total)


def _precision(header: GgufHeader) -> str:
    """The name of its file type; where that says nothing, the type that most bytes have."""
    from shortstack.export.gguf_types import PRECISIONS

    told = header.value("general.file_type")
    named = [name for name, row in PRECISIONS.items() if row.file_type == told]
    if told is not None and named:
        return named[0]
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[GGML_TYPES[tensor.kind].name] += tensor.n_bytes
    return sizes.most_common(1)[0][0]


def _onnx(place: Path) -> Artifact:
    """A graph of another tool; what it is quantized to shows in its operators."""
    require(("onnx_ir",), "onnx", "reading an ONNX graph")
    from shortstack.bench.onnx_graph import graph_facts
    from shortstack.export.onnx_graph import bytes_per_token

    model = place / "model.onnx"
    config = [name for name in ("genai_config.json",) if (place / name).is_file()]
    facts = graph_facts(model)
    files = [model.name, *facts.data_files]
    return Artifact(
        path=place,
        spec=ExportSpec("onnx", facts.precision),
        n_layers=facts.n_layers,
        n_params=facts.n_params,
        size_bytes=sum((place / name).stat().st_size for name in files),
        weight_bytes_per_token=bytes_per_token(model),
        sha256=hash_files(place, [*files, *config]),
        source_sha256=hash_files(place, files),
        notes=(FOREIGN,),
    )
