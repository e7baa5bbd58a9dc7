"""What is evaluated: a checkpoint, a GGUF file, an ONNX folder, or a folder of an export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifact import Artifact
from shortstack.checkpoint import NO_SHARDS, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.evaluate.codec import Codec, FolderCodec, packed_codec
from shortstack.evaluate.scorer import Scorer
from shortstack.families import context_tokens
from shortstack.gguf_header import read_header
from shortstack.intake import is_packed
from shortstack.manifest import read_manifest
from shortstack.packed.runnable import PACKED, check_runnable, preview_of
from shortstack.runtimes import RUNTIMES, open_session, runtimes_for

PYTORCH = "pytorch"


@dataclass(frozen=True)
class Loading:
    """How models are opened. `device` and `dtype` are PyTorch's alone, of folders and of packed
    files; `batch_tokens` is of folders."""

    context_tokens: int = 2048
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Target:
    """One model to evaluate and the runtime that runs it. `sha256` is of its content."""

    label: str
    path: Path
    runtime: str
    sha256: str
    size_bytes: int
    n_layers: int | None = None
    export: str | None = None
    """Format and precision of an artifact, as its manifest has it."""
    artifact_sha256: str | None = None
    """What records call the same artifact by: of the files that run, without the tokenizer's."""
    tokenizer: Path | None = None
    """A folder with tokenizer.json, where the model's own place has none."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "path": str(self.path),
            "runtime": self.runtime,
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "n_layers": self.n_layers,
            "export": self.export,
            "artifact_sha256": self.artifact_sha256,
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
        }

    @property
    def record(self) -> dict[str, Any]:
        """The same for a record: names, no folders of the machine."""
        name = None if self.tokenizer is None else self.tokenizer.name
        return {**self.to_dict(), "path": self.path.name, "tokenizer": name}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Target:
        given = data["tokenizer"]
        places = {"path": Path(data["path"]), "tokenizer": Path(given) if given else None}
        return cls(**{**data, **places})

    def codec(self) -> Codec:
        """The model's own tokenizer."""
        if self.tokenizer is not None:
            return FolderCodec(self.tokenizer)
        if self.path.suffix == ".gguf":
            from shortstack.evaluate.gguf_codec import GgufCodec

            return GgufCodec(self.path)
        if self.runtime == PACKED:
            return packed_codec(self.path)
        return FolderCodec(self.path)

    def open(self, loading: Loading) -> Scorer:
        """Open the model; the caller closes it."""
        if self.runtime == PYTORCH:
            from shortstack.evaluate.torch_scorer import TorchScorer

            checkpoint = Checkpoint.open(self.path)
            longest = context_tokens(checkpoint.config, windowed=True) or loading.context_tokens
            return TorchScorer(
                checkpoint,
                device=loading.device,
                dtype=loading.dtype,
                threads=loading.threads,
                batch_tokens=loading.batch_tokens,
                max_tokens=min(longest, loading.context_tokens),
            )
        from shortstack.evaluate.session_scorer import SessionScorer

        length = min(self._longest() or loading.context_tokens, loading.context_tokens)
        ours = self.runtime == PACKED
        session = open_session(
            self.path,
            self.runtime,
            threads=loading.threads,
            context_tokens=length,
            device=loading.device if ours else "cpu",
            options={"dtype": loading.dtype} if ours else {},
        )
        return SessionScorer(session, max_tokens=length)

    def _longest(self) -> int | None:
        """How many tokens the file says that it was made for; None where it does not say."""
        if self.runtime == PACKED:
            return context_tokens(preview_of(self.path).config, windowed=True)
        if self.path.suffix == ".gguf":
            header = read_header(self.path)
            return header.integer(f"{header.text('general.architecture')}.context_length") or None
        genai, config = self.path / "genai_config.json", self.path / "config.json"
        if genai.is_file():
            length = _json(genai)["model"].get("context_length")
            # at its maximal length a generator of onnxruntime-genai takes no logits back
            return length and int(length) - (self.runtime == "onnxruntime-genai")
        return context_tokens(_json(config)) if config.is_file() else None


def target_of(
    place: Path, *, label: str = "", runtime: str = "", tokenizer: Path | None = None
) -> Target:
    """Find out what lies at a place: a checkpoint, a .gguf file, or a folder with either or ONNX.

    `runtime`: another than the format's default. Raises ShortstackError where nothing of it lies
    there, and for a runtime that does not open it.
    """
    path, fmt, artifact = _recognised(place)
    if fmt == "packed":
        check_runnable()
    fitting = runtimes_for(fmt, [runtime] if runtime else ())
    if not fitting:
        opens = ", ".join(name for name, (opened, _) in RUNTIMES.items() if opened == fmt)
        raise ShortstackError(f"{runtime} does not open {path}. Runtimes that do: {opens}.")
    files = _files(path, fmt)
    return Target(
        label or place.name.removesuffix(".gguf"),
        path,
        fitting[0],
        _sha256(files),
        sum(file.stat().st_size for file in files),
        _n_layers(path, fmt, place),
        artifact.spec.slug if artifact else None,
        artifact.sha256 if artifact else None,
        tokenizer,
    )


def _recognised(place: Path) -> tuple[Path, str, Artifact | None]:
    """(what to open, its format, the artifact of the manifest)."""
    manifest = read_manifest(place) if place.is_dir() else None
    if manifest is not None and "artifact" in manifest:
        from shortstack.commands.stages import open_artifact

        artifact = open_artifact(place)
        return artifact.path, artifact.format, artifact
    if place.is_file() and place.suffix == ".gguf":
        return place, "gguf", None
    if place.is_file() and is_packed(place):
        return place, "packed", None
    if (place / "model.onnx").is_file():
        return place, "onnx", None
    if (place / "config.json").is_file():
        return place, "checkpoint", None
    inside = sorted(place.glob("*.gguf")) if place.is_dir() else []
    if len(inside) == 1:
        return inside[0], "gguf", None
    raise ShortstackError(
        f"{place} is no model: neither a Hugging Face folder, a .gguf file, a folder with "
        "model.onnx, nor the folder of an export. Mend the path."
    )


def _files(path: Path, fmt: str) -> list[Path]:
    """What decides a model's numbers."""
    if path.is_file():
        return [path]
    wanted = {"onnx": ("*.onnx*", "*.data", "*.json"), "checkpoint": ("*.safetensors", "*.json")}
    # the weights hold what the codes say; exits beside a model are no part of it
    ours = {"shortstack.json", "exits.json", *NO_SHARDS}
    found = {f for pattern in wanted[fmt] for f in path.glob(pattern) if f.name not in ours}
    return sorted(found)


def _sha256(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _n_layers(path: Path, fmt: str, place: Path) -> int | None:
    if fmt == "checkpoint":
        return Checkpoint.open(path).n_layers
    if fmt == "packed":
        return preview_of(path).n_layers
    artifact = (read_manifest(place) or {}).get("artifact", {}) if place.is_dir() else {}
    if "n_layers" in artifact:
        return int(artifact["n_layers"])
    if fmt == "gguf":
        header = read_header(path)
        return header.integer(f"{header.text('general.architecture')}.block_count") or None
    return None


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
