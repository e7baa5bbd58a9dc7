"""Text to token ids and back, by the rules of lm-evaluation-harness."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Protocol

from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.evaluate.scorer import Pair


class Codec(Protocol):
    """A tokenizer as an evaluation needs it."""

    @property
    def start(self) -> int:
        """Stands in for an empty context: beginning of text, else end of text."""
        ...

    @property
    def end(self) -> int | None:
        """End of text; generation stops there."""
        ...

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text: beginning of text, or nothing."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the bare text, without the prefix."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        ...


class FolderCodec:
    """tokenizer.json and tokenizer_config.json of a checkpoint or of an ONNX export."""

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtraError("tokenizers", "prune", "cutting text into tokens") from None
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ShortstackError(
                f"{folder} has no tokenizer.json. Save the fast tokenizer into it, or name a "
                "folder that has one: --tokenizer FOLDER"
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        # a tokenizer that was saved while it cut or filled would do it here, too
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = _special_tokens(folder)
        self._bos, self.end = self._id(names.get("bos_token")), self._id(names.get("eos_token"))
        around = self._tokenizer.encode("", add_special_tokens=True).ids
        self.prefix: list[int] = [i for i in around[:1] if i == self._bos]
        start = self.end if self._bos is None else self._bos
        if start is None:
            raise ShortstackError(
                f"{folder}/tokenizer_config.json names neither bos_token nor eos_token. Add one."
            )
        self.start: int = start

    def _id(self, token: str | None) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token) if token else None
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def packed_codec(file: Path) -> FolderCodec:
    """The tokenizer that a packed file holds."""
    from shortstack.packed.resident import Resident

    resident = Resident(file)
    with tempfile.TemporaryDirectory() as folder:
        resident.write_files(Path(folder))
        if not (Path(folder) / "tokenizer.json").is_file():
            raise ShortstackError(
                f"{file} holds no tokenizer.json. Name a folder that has one: --tokenizer FOLDER"
            )
        return FolderCodec(Path(folder))


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and `eos_token` as text; the first file that names one is right."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            given: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in ("bos_token", "eos_token"):
            token = given.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(key, token)
    return found


def with_prefix(codec: Codec, text: str) -> list[int]:
    """Ids of a text as a model expects its beginning."""
    ids = codec.encode(text)
    # a text that spells the beginning of text out gets no second one
    return ids if ids[:1] == codec.prefix else [*codec.prefix, *ids]


def encode_pair(codec: Codec, context: str, continuation: str) -> Pair:
    """Encode context and continuation together, split where the context alone would end.

    The rule of lm-evaluation-harness (`TemplateLM._encode_pair`): white space that ends the
    context moves to the continuation, since tokens begin with their space; an empty context
    becomes the token of the beginning of text. Raises ShortstackError where nothing remains of
    the continuation.
    """
    bare = context.rstrip()
    if bare:
        whole = with_prefix(codec, context + continuation)
        head = with_prefix(codec, bare)
        pair = (head, whole[len(head) :])
    else:
        ids = codec.encode(context + continuation)
        pair = ([codec.start], ids) if ids[:1] != [codec.start] else (ids[:1], ids[1:])
    if not pair[0] or not pair[1]:
        raise ShortstackError(
            f"the continuation {continuation[:40]!r} has no token of its own after its prompt. "
            "Mend or remove the row."
        )
    return pair
