"""transformers on a checkpoint folder: float32 is the oracle that artifacts are held against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.exits import is_exits, split_depth
from shortstack.pretrained import load
from shortstack.runtimes.capabilities import device_kind
from shortstack.runtimes.pytorch_quantize import PLAIN, load_quantized


class Loader(Protocol):
    """Opens a model: returns it, on the torch device, and facts for a session's info."""

    def __call__(self, path: Path, *, dtype: str, device: Any) -> tuple[Any, dict[str, Any]]: ...


class PyTorchSession:
    """A Hugging Face folder open in transformers, on the CPU or on CUDA.

    `quantize`: what the weights of its linear layers are turned into while they load, a word of
    `capabilities`. `loader`: what opens the path instead, for files that are no such folder.
    """

    RUNTIME = "pytorch"
    STEPS_OF_ONE_SHAPE = False
    """Whether decoding attends to as many slots at every step."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        context_tokens: int,
        device: str = "cpu",
        batch: int = 1,
        dtype: str = "float32",
        quantize: str = PLAIN,
        loader: Loader | None = None,
    ) -> None:
        torch, transformers = _packages()
        torch.set_num_threads(threads)
        self._torch = torch
        self._device = _device(torch, device)
        if self._device.type == "cuda":
            # cuDNN plans attention anew for each length of the cache, 40 ms a decoded token on an
            # H200 (docs/cards.md); the other kernels of PyTorch know no such plan
            torch.backends.cuda.enable_cudnn_sdp(self.STEPS_OF_ONE_SHAPE)
        if loader is None:
            loader = _load_plain if quantize == PLAIN else partial(load_quantized, word=quantize)
        self._model, weights = loader(path, dtype=dtype, device=self._device)
        self._synchronize()  # the copy to the device belongs to the load
        self._cache: Any = None
        self._context_tokens = context_tokens
        self._tokenizer_file = path / "tokenizer.json"
        self._info = {
            "runtime": self.RUNTIME,
            "version": torch.__version__,
            "transformers": transformers.__version__,
            "threads": threads,
            "context_tokens": context_tokens,
            "kv_cache": dtype,
            "dtype": dtype,
            "device": str(self._device),
            "batch": batch,
            "cudnn_attention": self._device.type == "cuda" and self.STEPS_OF_ONE_SHAPE,
            "attention": str(self._model.config.get_text_config()._attn_implementation),
            "quantize": quantize,
            **weights,
        }

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def info(self) -> dict[str, Any]:
        return dict(self._info)

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._empty_cache()
        logits = self._forward([tokens], keep=0 if all_logits else 1)[0]
        return logits if all_logits else np.asarray(logits[-1])

    def decode(self, token: int) -> NDArray[np.float32]:
        self._check_begun("decode")
        return np.asarray(self._forward([[token]], keep=1)[0, -1])

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._check_begun("extend")
        return np.asarray(self._forward([tokens], keep=1)[0, -1])

    def _check_begun(self, step: str) -> None:
        if self._cache is None:
            raise ShortstackError(f"{step} needs a prefill before it.")

    def prefill_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self._empty_cache()
        return self.extend_rows(rows)

    def extend_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self._check_begun("extend")
        return np.asarray(self._forward(rows.tolist(), keep=1)[:, -1])

    def _empty_cache(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config.get_text_config())

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        return np.asarray(self._forward([tokens], keep=0)[0]) if self._crop(keep) else None

    def resume_rows(self, keep: int, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        return self.extend_rows(rows) if self._crop(keep) else None

    def _crop(self, keep: int) -> bool:
        """Whether the cache could forget all but the first `keep` tokens."""
        if self._cache is None or self._has_windows:
            return False
        surplus = self._cache.get_seq_length() - keep
        if surplus:
            self._cache.crop(-surplus)
        return True

    @property
    def _has_windows(self) -> bool:
        """Whether some layers keep only the last keys and values."""
        return any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)

    def _forward(self, rows: Sequence[Sequence[int]], keep: int) -> NDArray[np.float32]:
        """Logits on the host, shape (rows, kept, vocab): the copy waits for the device."""
        self._check_room(len(rows[0]))
        torch = self._torch
        with torch.inference_mode():
            result = self._model(
                input_ids=torch.tensor([list(row) for row in rows], device=self._device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: NDArray[np.float32] = result.logits.float().cpu().numpy()
        return logits

    def _check_room(self, n_tokens: int) -> None:
        if self._cache.get_seq_length() + n_tokens > self._context_tokens:
            raise ShortstackError(
                f"the context of {self._context_tokens} tokens is full. Ask for fewer tokens."
            )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

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


def _load_plain(path: Path, dtype: str, device: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    straight = None if device.type == "cpu" or not _has_accelerate() else device
    return load(path, getattr(torch, dtype), device=straight).to(device), {}


def _has_accelerate() -> bool:
    """transformers places tensors as it reads them only with it."""
    return find_spec("accelerate") is not None


def _device(torch: Any, device: str) -> Any:
    kind, number = device_kind(device)
    if kind == "cuda":
        seen = torch.cuda.device_count()
        if number >= seen:
            raise ShortstackError(
                f"PyTorch {torch.__version__} sees {seen} CUDA devices, {device} is asked for. "
                "Install a CUDA build of torch, or see what is here: shortstack doctor"
            )
        return torch.device("cuda", number)
    return torch.device("cpu")


def open_session(
    path: Path,
    *,
    threads: int,
    context_tokens: int,
    device: str = "cpu",
    batch: int = 1,
    dtype: str = "float32",
    quantize: str = PLAIN,
    cuda_graph: str = "off",
) -> PyTorchSession:
    """A session; of exits, by their folder or as `EXITS@15`, one whose depth can be chosen."""
    folder, depth = split_depth(path)
    if depth is not None or (is_exits(path) and not (path / "config.json").is_file()):
        _packages()
        if cuda_graph == "on" or quantize != PLAIN:
            raise ShortstackError(
                "exits go with neither cuda_graph=on nor quantize. Leave them out, or write the "
                "exit as a model of its own: shortstack exits export"
            )
        from shortstack.runtimes.pytorch_exits import ExitsSession

        return ExitsSession(
            folder,
            threads=threads,
            context_tokens=context_tokens,
            device=device,
            batch=batch,
            dtype=dtype,
            depth=depth,
        )
    kind = PyTorchSession
    if cuda_graph == "on":
        _packages()
        from shortstack.runtimes.pytorch_graph import GraphSession

        kind = GraphSession
    return kind(
        path,
        threads=threads,
        context_tokens=context_tokens,
        device=device,
        batch=batch,
        dtype=dtype,
        quantize=quantize,
    )
