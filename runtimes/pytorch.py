"""transformers on a checkpoint folder: float32 is the oracle that artifacts are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.pretrained import load

DTYPES = ("float32", "bfloat16", "float16")


class PyTorchSession:
    """A Hugging Face folder open in transformers, on the CPU."""

    def __init__(
        self, path: Path, *, threads: int, context_tokens: int, dtype: str = "float32"
    ) -> None:
        torch, transformers = _packages()
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = load(path, getattr(torch, dtype))
        self._cache: Any = None
        self._context_tokens = context_tokens
        self._tokenizer_file = path / "tokenizer.json"
        self._info = {
            "runtime": "pytorch",
            "version": torch.__version__,
            "transformers": transformers.__version__,
            "threads": threads,
            "context_tokens": context_tokens,
            "kv_cache": dtype,
            "dtype": dtype,
        }

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def info(self) -> dict[str, Any]:
        return dict(self._info)

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config.get_text_config())
        logits = self._forward(tokens, keep=0 if all_logits else 1)
        return logits if all_logits else np.asarray(logits[-1])

    def decode(self, token: int) -> NDArray[np.float32]:
        if self._cache is None:
            raise ShortstackError("decode needs a prefill before it.")
        return np.asarray(self._forward([token], keep=1)[-1])

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        if self._cache is None or self._has_windows:
            return None
        surplus = self._cache.get_seq_length() - keep
        if surplus:
            self._cache.crop(-surplus)
        return self._forward(tokens, keep=0)

    @property
    def _has_windows(self) -> bool:
        """Whether some layers keep only the last keys and values."""
        return any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)

    def _forward(self, tokens: Sequence[int], keep: int) -> NDArray[np.float32]:
        if self._cache.get_seq_length() + len(tokens) > self._context_tokens:
            raise ShortstackError(
                f"the context of {self._context_tokens} tokens is full. Ask for fewer tokens."
            )
        torch = self._torch
        with torch.inference_mode():
            result = self._model(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: NDArray[np.float32] = result.logits[0].float().numpy()
        return logits

    def tokenize(self, text: str) -> list[int] | None:
        if not self._tokenizer_file.is_file():
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def close(self) -> None:
        self._cache = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _packages() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(str(error.name), "prune", "running a checkpoint") from None
    return torch, transformers


def open_session(path: Path, *, threads: int, context_tokens: int) -> PyTorchSession:
    return PyTorchSession(path, threads=threads, context_tokens=context_tokens)
