"""onnxruntime-genai on an exported folder: the runtime that applications use, its own cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.runtimes.capabilities import device_kind


class GenaiSession:
    """A folder with genai_config.json open in onnxruntime-genai; on CUDA it is untested."""

    def __init__(
        self, path: Path, *, threads: int, context_tokens: int, device: str = "cpu"
    ) -> None:
        try:
            import onnxruntime_genai
        except ImportError:
            raise MissingExtraError("onnxruntime-genai", "onnx", "running an ONNX model") from None
        onnxruntime_genai.disable_telemetry_events()
        self._genai = onnxruntime_genai
        self._model = _open(onnxruntime_genai, path, threads, device)
        self._context_tokens = context_tokens
        self._generator: Any = self._new_generator()
        self._begun = False
        self._tokenizer: Any = None
        config = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        self._vocab = int(config["model"]["vocab_size"])
        outputs = config["model"].get("decoder", {}).get("outputs", {})
        self._first_key = outputs.get("present_key_names", "present.%d.key").replace("%d", "0")
        self._info = {
            "runtime": "onnxruntime-genai",
            "version": onnxruntime_genai.__version__,
            "threads": threads,
            "context_tokens": context_tokens,
            "device": device,
        }

    @property
    def vocab_size(self) -> int:
        return self._vocab

    @property
    def info(self) -> dict[str, Any]:
        """`kv_cache` is known behind the first prompt: genai tells types with values alone."""
        if self._begun and "kv_cache" not in self._info:
            with contextlib.suppress(RuntimeError):  # a graph that names its cache otherwise
                self._info["kv_cache"] = self._generator.get_output(self._first_key).dtype.name
        return dict(self._info)

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._empty_cache()
        self._generator.append_tokens(np.array([tokens], np.int32))
        if all_logits:
            return np.array(self._generator.get_output("logits")[0], np.float32)
        return self._last_logits()

    def _empty_cache(self) -> None:
        """Go back to the start: a new generator would allocate its cache while the clock runs."""
        self._begun = True
        with contextlib.suppress(RuntimeError):  # some kinds of model cannot go back
            self._generator.rewind_to(0)
            return
        self._generator = self._new_generator()

    def _new_generator(self) -> Any:
        params = self._genai.GeneratorParams(self._model)
        # one token more: at its maximal length a generator takes no logits back
        params.set_search_options(max_length=self._context_tokens + 1, do_sample=False)
        try:
            return self._genai.Generator(self._model, params)
        except RuntimeError as error:
            raise ShortstackError(
                f"onnxruntime-genai cannot make a cache of {self._context_tokens} tokens: "
                f"{one_line(str(error), 300)}. Ask for fewer tokens."
            ) from None

    def decode(self, token: int) -> NDArray[np.float32]:
        if not self._begun:
            raise ShortstackError("decode needs a prefill before it.")
        self._generator.append_tokens(np.array([[token]], np.int32))
        return self._last_logits()

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if not self._begun:
            raise ShortstackError("extend needs a prefill before it.")
        self._generator.append_tokens(np.array([tokens], np.int32))
        return self._last_logits()

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        if not self._begun:
            return None
        self._generator.rewind_to(keep)
        self._generator.append_tokens(np.array([tokens], np.int32))
        return np.array(self._generator.get_output("logits")[0], np.float32)

    def _last_logits(self) -> NDArray[np.float32]:
        return np.array(self._generator.get_logits().reshape(-1, self._vocab)[-1], np.float32)

    def tokenize(self, text: str) -> list[int] | None:
        if self._tokenizer is None:
            self._tokenizer = self._genai.Tokenizer(self._model)
        return [int(index) for index in self._tokenizer.encode(text)]

    def close(self) -> None:
        self._generator = self._tokenizer = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(genai: Any, path: Path, threads: int, device: str) -> Any:
    if not (path / "genai_config.json").is_file():
        raise ShortstackError(
            f"{path} holds no genai_config.json. Name the folder of an ONNX export by shortstack."
        )
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    try:
        config = genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        kind, number = device_kind(device)
        config.clear_providers()
        if kind == "cuda":
            config.append_provider("cuda")
            config.set_provider_option("cuda", "device_id", str(number))
        return genai.Model(config)
    except RuntimeError as error:
        raise ShortstackError(
            f"onnxruntime-genai cannot open {path}: {one_line(str(error), 300)}. Export it again."
        ) from None


def open_session(
    path: Path, *, threads: int, context_tokens: int, device: str = "cpu", batch: int = 1
) -> GenaiSession:
    assert batch == 1, "capabilities.CAPABILITIES says that batches are refused"
    return GenaiSession(path, threads=threads, context_tokens=context_tokens, device=device)
