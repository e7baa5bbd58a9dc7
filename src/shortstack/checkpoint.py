"""A model as files: config, safetensors shards, tokenizer. Opens without torch, reads lazily."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, one_line
from shortstack.families import (
    Family,
    decoder_config,
    dims,
    expected_tensors,
    family_of,
    removed_sub_blocks,
)
from shortstack.families.table import Part
from shortstack.safetensors_header import open_head

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIDECAR = "row_codes.safetensors"
"""Codes and steps of quantized weights (`shortstack.row_codes`), beside the shards."""
EXITS_FILE = "exits.safetensors"
"""Exits of the model (`shortstack.exits`), where they lie beside the shards: no part of it."""
PACKED_SUFFIX = ".packed.safetensors"
"""What `export --to packed` names its file by."""
NO_SHARDS = frozenset({SIDECAR, EXITS_FILE})
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Copied byte for byte through every step: a re-saved tokenizer can stop a converter."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose config and tensors agree. Nothing is loaded."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open and check a folder.

        Raises ShortstackError for an unknown architecture, a pickle, a truncated shard, and a
        config.json that disagrees with the tensors.
        """
        config = _read_config(path)
        decoder_config(config)
        if config.get("quantization_config"):
            raise ShortstackError(
                f"{path} is quantized (config.json has quantization_config). "
                "Start from the unquantized checkpoint."
            )
        checkpoint = cls(path, config, _read_headers(path))
        checkpoint._check_schema()
        return checkpoint

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def text(self) -> Mapping[str, Any]:
        """The config of the decoder, which a multimodal model nests in its own."""
        return decoder_config(self.config)

    @property
    def removed(self) -> Mapping[Part, tuple[int, ...]]:
        """Layers whose attention or MLP was removed alone: its output projection is zero."""
        return removed_sub_blocks(self.text)

    @property
    def cut_facts(self) -> Mapping[str, Any]:
        """What plan.json beside the config says of the cut that made this folder; may be empty."""
        file = self.path / "plan.json"
        try:
            plan = json.loads(file.read_text(encoding="utf-8"))
            return {"drop": plan["drop"], **plan["facts"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    @property
    def n_layers(self) -> int:
        return int(self.text["num_hidden_layers"])

    @property
    def n_params(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        return sum(info.n_bytes for info in self.tensors.values())

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: no head tensor is stored."""
        return self.family.head.hf not in self.tensors

    @property
    def _may_tie(self) -> bool:
        """Whether the head may be the embedding; Gemma's configs leave it to transformers."""
        level = self.config if "tie_word_embeddings" in self.config else self.text
        return bool(level.get("tie_word_embeddings", self.family.tied_by_default))

    @property
    def dims(self) -> dict[str, int]:
        return dims(self.text)

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        return tuple(p for name in TOKENIZER_FILES if (p := self.path / name).is_file())

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of config, shards and tokenizer files, by name and content."""
        names = ["config.json", *self.shards, *(p.name for p in self.tokenizer_files)]
        if (self.path / SIDECAR).is_file():
            names.append(SIDECAR)
        return hash_files(self.path, names)

    def layer_bytes(self, index: int) -> int:
        prefix = self.family.layer_prefix.format(i=index)
        return sum(t.n_bytes for name, t in self.tensors.items() if name.startswith(prefix))

    def _check_schema(self) -> None:
        family, seen = self.family, set()
        for name, rule, shape, _ in expected_tensors(family, self.dims):
            info = self.tensors.get(name)
            if info is None:
                tied = self._may_tie and rule is family.head
                if rule.optional or tied:
                    continue
                raise ShortstackError(
                    f"{self.path}: config.json disagrees with the tensors: {name} is missing "
                    f"(config says {self.n_layers} layers). Download the folder again."
                )
            if info.shape != shape:
                raise ShortstackError(
                    f"{self.path}: config.json disagrees with the tensors: {name} is "
                    f"{list(info.shape)}, the config says {list(shape)}. "
                    "Download the folder again."
                )
            seen.add(name)
        extra = sorted(n for n in set(self.tensors) - seen if not n.startswith(family.others))
        if extra:
            raise ShortstackError(
                f"{self.path}: config.json disagrees with the tensors: {extra[0]} is unexpected "
                f"({len(extra)} such). Download the folder again."
            )


def hash_files(folder: Path, names: list[str]) -> str:
    """SHA-256 over names and contents, in the given order."""
    return hash_digests((name, hash_file(folder / name)) for name in names)


def hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_digests(digests: Iterable[tuple[str, str]]) -> str:
    """`hash_files` of files whose own SHA-256 is known."""
    total = hashlib.sha256()
    for name, digest in digests:
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def hashed_meanwhile(checkpoint: Checkpoint) -> Iterator[None]:
    """Compute `checkpoint.sha256` beside the work of the block; it is known after it.

    In a daemon thread, so that Ctrl-C need not wait for gigabytes.
    """

    def run() -> None:
        with contextlib.suppress(OSError):  # who asks for the hash gets the error
            _ = checkpoint.sha256

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        remedy = "Name a folder with config.json and *.safetensors, or a .gguf file."
        packed = list(path.glob(f"*{PACKED_SUFFIX}"))
        if len(packed) == 1:
            remedy = f"Make one of the packed model in it: shortstack unpack {packed[0]} -o FOLDER"
        raise ShortstackError(
            f"{path} is not a Hugging Face model folder: it has no config.json. {remedy}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShortstackError(
            f"{file} is not JSON ({one_line(str(error))}). Download it again."
        ) from None
    if not isinstance(config, dict):
        raise ShortstackError(f"{file} is not a JSON object. Download it again.")
    return config


def _shard_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise ShortstackError(f"{index} is not a shard index. Download it again.") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ShortstackError(
                f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(names)}). "
                "Download it again."
            )
        return names
    names = sorted(p.name for p in path.glob("*.safetensors") if p.name not in NO_SHARDS)
    if names:
        return names
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise ShortstackError(
            f"{path}: {pickles[0]} is a pickle, which can run code when opened, so it is refused. "
            "Convert it to safetensors first."
        )
    raise ShortstackError(f"{path} holds no *.safetensors file. Download the weights.")


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name in _shard_names(path):
        try:
            slots = open_head(path / name, "Download it again.").slots
        except OSError as error:
            raise ShortstackError(
                f"{path / name} cannot be read ({one_line(str(error))}). Download it again."
            ) from None
        for key, slot in sorted(slots.items()):
            if key in tensors:
                raise ShortstackError(
                    f"{path}: tensor {key} is in {tensors[key].file} and in {name}. "
                    "Remove the stale shard."
                )
            tensors[key] = TensorInfo(name, slot.dtype, slot.shape)
    quantized = [n for n, info in tensors.items() if info.dtype not in DTYPE_BYTES]
    if quantized:
        raise ShortstackError(
            f"{path}: tensor {quantized[0]} is {tensors[quantized[0]].dtype}, not a float. "
            "Start from the unquantized checkpoint."
        )
    return tensors
