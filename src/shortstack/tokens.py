"""A checkpoint's tokenizer, for cutting text into token windows. Needs `tokenizers` only."""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.checkpoint import Checkpoint
from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.text import token_windows


class Encoder:
    """Text to ids, with the beginning-of-text token where the tokenizer adds one by itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtraError("tokenizers", "prune", "cutting text into tokens") from None
        file = checkpoint.path / "tokenizer.json"
        if not file.is_file():
            raise ShortstackError(
                f"{checkpoint.path} has no tokenizer.json. Save the fast tokenizer into it."
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        around = self._tokenizer.encode("", add_special_tokens=True).ids
        bos = checkpoint.text.get("bos_token_id")
        self.prefix: list[int] = [i for i in around[:1] if i == bos]

    def encode(self, text: str) -> list[int]:
        """Ids of the bare text: no special token is added, none is recognised in it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def windows(self, documents: Sequence[str], length: int, count: int) -> list[list[int]]:
        """At most `count` windows of exactly `length` tokens, each with the prefix."""
        inner = length - len(self.prefix)
        cut = token_windows(documents, self.encode, inner, count)
        return [[*self.prefix, *window] for window in cut]
