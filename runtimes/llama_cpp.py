"""llama.cpp through its C API: one reused batch, no work per token but the call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError
from shortstack.libllama import clear_log, has_amx, last_words, libllama, log, system_info
from shortstack.llama_devices import handles, named, use_only
from shortstack.runtimes.capabilities import device_kind

BATCH = 512
"""Prompt tokens a step: llama.cpp's own default for a physical batch."""

CACHE_TYPES = {
    **{"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8},
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7},
}
"""ggml_type numbers of a KV cache, by name."""

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


@dataclass(frozen=True)
class Choice:
    """How a file is opened. Beyond the CPU untested. `gpu_layers`: `all` or a number."""

    threads: int
    context_tokens: int
    device: str = "cpu"
    batch: int = 1
    gpu_layers: str = "all"
    flash_attention: str = "auto"
    kv_type: str = "f16"

    @property
    def offloads(self) -> bool:
        return self.device != "cpu"


class LlamaCppSession:
    """A GGUF file open in llama.cpp."""

    def __init__(self, path: Path, choice: Choice) -> None:
        threads, context_tokens = choice.threads, choice.context_tokens
        self._choice = choice
        self._lib = libllama()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._backend = "CPU"
        self._past = 0
        clear_log()
        self._amx_avoided = has_amx()
        try:
            self._model = self._load(path)
            self._n_layers = int(self._lib.llama_model_n_layer(self._model))
            self._vocab = self._lib.llama_model_get_vocab(self._model)
            self._n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
            self._context = self._new_context(path)
            self._batch = self._lib.llama_batch_init(BATCH, 0, 1)
        except BaseException:
            self.close()
            raise
        for slot in range(BATCH):  # what seldom changes: each token belongs to sequence 0
            self._batch.n_seq_id[slot] = 1
            self._batch.seq_id[slot][0] = 0
        self._context_tokens = context_tokens
        self._info = {
            "runtime": "llama.cpp",
            "version": version("llama-cpp-python"),
            "threads": threads,
            "context_tokens": int(self._lib.llama_n_ctx(self._context)),
            "backend": self._backend,
            "n_gpu_layers": min(self._gpu_layers(), self._n_layers + 1),
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "mmap": _mapped(),
            "kv_cache": choice.kv_type.upper(),
            "flash_attention": choice.flash_attention,
            "device": choice.device,
            "batch": choice.batch,
            "cpu": system_info(),
            "extra_buffers": not self._amx_avoided,
        }
        if self._amx_avoided:
            self._info["note"] = (
                "this build of llama.cpp uses AMX, which crashes on batches in builds by gcc 12; "
                "AMX and weight repacking are off (use_extra_bufts=False)"
            )

    def _load(self, path: Path) -> Any:
        if not path.is_file():
            raise ShortstackError(f"{path} is not a file. Name a .gguf file.")
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = self._gpu_layers()
        pointers: list[int] = []
        if self._choice.offloads:
            name, pointer = self._device()
            self._backend = name.rstrip("0123456789")
            pointers = [pointer]
            params.split_mode = self._lib.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = 0  # of that list
        kept = use_only(params, *pointers)
        params.use_extra_bufts = not self._amx_avoided
        model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        del kept
        if not model:
            raise ShortstackError(
                f"llama.cpp cannot open {path}: {last_words()}. Export it again, or see which "
                "llama.cpp is in force: shortstack doctor"
            )
        return model

    def _device(self) -> tuple[str, int]:
        """The device's name and pointer in llama.cpp's list. Raises ShortstackError."""
        kind, number = device_kind(self._choice.device)
        if not self._lib.llama_supports_gpu_offload():
            raise ShortstackError(
                f"this llama.cpp was built for the CPU alone, {self._choice.device} is asked for. "
                "Build it for the device: shortstack doctor says how"
            )
        found = named(f"{kind}:{number}")
        if found is None:
            raise ShortstackError(
                f"this llama.cpp has no {kind}:{number}, it has: {', '.join(handles())}. "
                "Build it for the device: shortstack doctor says how"
            )
        return found

    def _gpu_layers(self) -> int:
        if not self._choice.offloads:
            return 0
        wanted = self._choice.gpu_layers
        return 1_000_000 if wanted == "all" else int(wanted)  # more than any model has

    def _new_context(self, path: Path) -> Any:
        choice, context_tokens = self._choice, self._choice.context_tokens
        params = self._lib.llama_context_default_params()
        params.n_ctx = context_tokens * choice.batch
        params.n_seq_max = choice.batch
        params.n_batch = params.n_ubatch = BATCH
        params.n_outputs_max = BATCH
        params.n_outputs_max_per_seq = BATCH
        params.n_threads = params.n_threads_batch = choice.threads
        params.offload_kqv = params.op_offload = choice.offloads
        params.flash_attn_type = FLASH_ATTENTION[choice.flash_attention]
        params.type_k = params.type_v = CACHE_TYPES[choice.kv_type]
        params.no_perf = True
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise ShortstackError(
                f"llama.cpp cannot make a context of {context_tokens} tokens for {path}: "
                f"{last_words()}. Ask for fewer tokens or another KV type."
            )
        return context

    @property
    def vocab_size(self) -> int:
        return self._n_vocab

    @property
    def info(self) -> dict[str, Any]:
        return dict(self._info)

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._empty_cache()
        return self._append(tokens, all_logits)

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._append(tokens, False)

    def prefill_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self._empty_cache()
        return self.extend_rows(rows)

    def extend_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        height, length = rows.shape
        width = max(1, BATCH // height)
        for start in range(0, length, width):
            part = rows[:, start : start + width]
            self._fill_rows(part, last=start + width >= length)
            self._step(part.shape[1], height)
        ends = (part.shape[1] * (row + 1) - 1 for row in range(height))
        return np.stack([self._logits(end) for end in ends])

    def _fill_rows(self, rows: NDArray[np.int64], *, last: bool) -> None:
        """Row by row into the batch; logits are wanted of the last token of each at the end."""
        batch, width = self._batch, rows.shape[1]
        for slot, token in enumerate(rows.ravel().tolist()):
            row, column = divmod(slot, width)
            batch.token[slot] = token
            batch.pos[slot] = self._past + column
            batch.seq_id[slot][0] = row
            batch.logits[slot] = last and column == width - 1

    def _empty_cache(self) -> None:
        # False: cells are freed, not zeroed; zeroing a long cache takes longer than a short prompt
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._past = 0

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        return self._append(tokens, True) if self._go_back(keep, 1) else None

    def resume_rows(self, keep: int, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        return self.extend_rows(rows) if self._go_back(keep, len(rows)) else None

    def _go_back(self, keep: int, height: int) -> bool:
        """Whether each of `height` sequences could forget all but its first `keep` tokens."""
        memory = self._lib.llama_get_memory(self._context)
        # layers with a window lose what lies before it: the first new token must still see it all
        least = max(0, keep - self._lib.llama_model_n_swa(self._model))
        for row in range(height):
            if self._lib.llama_memory_seq_pos_min(memory, row) > least:
                return False
            if not self._lib.llama_memory_seq_rm(memory, row, keep, -1):
                return False
        self._past = keep
        return True

    def _append(self, tokens: Sequence[int], all_logits: bool) -> NDArray[np.float32]:
        out = np.empty((len(tokens), self._n_vocab), np.float32) if all_logits else None
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            last = start + len(part) == len(tokens)
            self._fill(part, all_logits, last)
            self._step(len(part))
            if out is not None:
                for row in range(len(part)):
                    out[start + row] = self._logits(row)
        return out if out is not None else self._logits(-1).copy()

    def decode(self, token: int) -> NDArray[np.float32]:
        batch = self._batch
        batch.token[0] = token
        batch.pos[0] = self._past
        batch.logits[0] = 1
        self._step(1)
        return self._logits(-1).copy()

    def _fill(self, tokens: Sequence[int], all_logits: bool, last: bool) -> None:
        batch = self._batch
        for slot, token in enumerate(tokens):
            batch.token[slot] = token
            batch.pos[slot] = self._past + slot
            batch.logits[slot] = all_logits
        batch.logits[len(tokens) - 1] = all_logits or last

    def _step(self, count: int, height: int = 1) -> None:
        """Run the filled batch: `count` tokens of each of `height` sequences."""
        if self._past + count > self._context_tokens:
            raise ShortstackError(
                f"the context of {self._context_tokens} tokens is full. Ask for fewer tokens."
            )
        self._batch.n_tokens = count * height
        code = self._lib.llama_decode(self._context, self._batch)
        if code:
            raise ShortstackError(
                f"llama.cpp failed with code {code} at token {self._past}: {last_words()}. "
                "See what works here: shortstack doctor"
            )
        self._past += count

    def _logits(self, row: int) -> NDArray[np.float32]:
        """A view into llama.cpp's buffer, good until the next step."""
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise ShortstackError(f"llama.cpp has no logits for row {row}: {last_words()}.")
        return np.ctypeslib.as_array(pointer, (self._n_vocab,))

    def tokenize(self, text: str) -> list[int] | None:
        raw = text.encode()
        room = len(raw) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def close(self) -> None:
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _mapped() -> bool | None:
    """Whether the weights are read through a map of the file: llama.cpp decides, its log says."""
    modes = (line.partition("load_mode = ")[2] for line in log())
    mode = next((words for words in modes if words), None)
    return None if mode is None else "mmap" in mode


def open_session(path: Path, **choice: Any) -> LlamaCppSession:
    """`choice`: the fields of Choice."""
    made = Choice(**choice)
    if made.batch > BATCH:
        raise ShortstackError(f"llama.cpp runs batches up to {BATCH}, {made.batch} is asked for.")
    return LlamaCppSession(path, made)
