"""The tokenizer inside a GGUF file, by llama.cpp; opens the vocabulary alone."""

from __future__ import annotations

import ctypes
from pathlib import Path

from shortstack.errors import ShortstackError
from shortstack.libllama import clear_log, last_words, libllama


class GgufCodec:
    """Text to ids and back as llama.cpp does it."""

    def __init__(self, file: Path) -> None:
        self._lib = libllama()
        clear_log()
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise ShortstackError(
                f"llama.cpp cannot open {file}: {last_words()}. Export it again, or see which "
                "llama.cpp is in force: shortstack doctor"
            )
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        bos, eos = self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab)
        self.end: int | None = eos if eos >= 0 else None
        self.start: int = bos if bos >= 0 else eos
        adds = self._lib.llama_vocab_get_add_bos(self._vocab) and bos >= 0
        self.prefix: list[int] = [bos] if adds else []

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        room = len(raw) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def decode(self, ids: list[int]) -> str:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 16
        while True:
            raw = ctypes.create_string_buffer(room)
            count = self._lib.llama_detokenize(
                self._vocab, tokens, len(ids), raw, room, True, False
            )
            if count >= 0:
                return raw.raw[:count].decode(errors="replace")
            room = -count
