"""A teacher's likeliest tokens on disk, for text that is read more than once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.disk import disk_errors, require_space
from shortstack.errors import ShortstackError
from shortstack.manifest import step_key, write_text
from shortstack.prune.heal.distill import Top, chunk_rows
from shortstack.prune.heal.model import final_hidden, head_of
from shortstack.prune.heal.settings import HealSettings

SHARD_WINDOWS = 64
ID_BYTES, LOG_P_BYTES, REST_BYTES = 4, 2, 4


def check_cacheable(settings: HealSettings) -> None:
    """Raise ShortstackError where a run reads nothing that a cache could hold."""
    if settings.top_k is None or settings.loss not in ("kl", "mix"):
        raise ShortstackError(
            "a cache holds the teacher's likeliest tokens for the loss kl or mix. Say how many "
            "with --top-k, e.g. 32."
        )


class TeacherCache:
    """One safetensors file for each 64 windows: `ids` int32 and `log_p` float16 (windows,
    positions, k), `log_rest` float32 (windows, positions)."""

    def __init__(
        self, folder: Path, teacher_sha256: str, windows: Tensor, settings: HealSettings
    ) -> None:
        check_cacheable(settings)
        self._folder, self._windows, self._settings = folder, windows, settings
        self._key = step_key(
            "teacher-cache",
            {
                "teacher": teacher_sha256,
                "windows": windows.tolist(),
                "k": settings.top_k,
                "temperature": settings.temperature,
            },
        )

    @property
    def n_bytes(self) -> int:
        positions = self._windows.shape[0] * (self._windows.shape[1] - 1)
        k = self._settings.top_k or 0
        return positions * (k * (ID_BYTES + LOG_P_BYTES) + REST_BYTES)

    def fill(self, teacher: Any, micro: int, turn: tuple[int, int]) -> None:
        """Run the teacher on what is not there yet; of several processes, each its share."""
        from safetensors.torch import save_file

        self._claim()
        process, processes = turn
        for number, rows in enumerate(self._windows.split(SHARD_WINDOWS)):
            file = self._file(number)
            if number % processes != process or file.is_file():
                continue
            parts = [self._top(teacher, part) for part in rows.split(micro)]
            tensors = {
                "ids": torch.cat([top.ids.int() for top in parts]),
                "log_p": torch.cat([top.log_p.half() for top in parts]),
                "log_rest": torch.cat([top.log_rest for top in parts]),
            }
            shape = (len(rows), rows.shape[1] - 1)
            shaped = {n: t.unflatten(0, shape).cpu().contiguous() for n, t in tensors.items()}
            partial = file.with_suffix(".partial")
            with disk_errors(self._folder):
                save_file(shaped, partial)
                os.replace(partial, file)

    def read(self, rows: list[int], device: torch.device) -> Top:
        """The positions of these windows one after another, their probabilities summing to 1."""
        from safetensors import safe_open

        found: dict[str, list[Tensor]] = {"ids": [], "log_p": [], "log_rest": []}
        for row in rows:
            number, at = divmod(row, SHARD_WINDOWS)
            with safe_open(self._file(number), framework="pt") as stored:
                for name, parts in found.items():
                    parts.append(stored.get_slice(name)[at : at + 1].flatten(0, 1))
        ids, log_p, log_rest = (torch.cat(parts).to(device) for parts in found.values())
        # float16 is off by some thousandths: what the loss divides must be a distribution
        joined = torch.cat([log_p.float(), log_rest[:, None]], -1).log_softmax(-1)
        return Top(ids.long(), joined[:, :-1], joined[:, -1])

    def _top(self, teacher: Any, tokens: Tensor) -> Top:
        head = head_of(teacher)
        hidden = final_hidden(teacher, tokens.to(head.weight.device))
        k = self._settings.top_k or 1
        parts = [
            Top.of(head.logits(rows), k, self._settings.temperature)
            for rows in hidden.split(chunk_rows(head))
        ]
        return Top(*(torch.cat(field) for field in zip(*map(_fields, parts), strict=True)))

    def _claim(self) -> None:
        """Take over an empty folder or one of ours; what is of another teacher or text goes."""
        marker = self._folder / "cache.json"
        wanted = {"tool": "shortstack", "key": self._key}
        if self._folder.exists() and any(self._folder.iterdir()) and not marker.is_file():
            raise ShortstackError(
                f"{self._folder} exists and is no cache of ours. Choose another folder."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
            return
        require_space(self._folder, self.n_bytes)
        for file in self._folder.glob("windows-*"):
            file.unlink(missing_ok=True)
        write_text(marker, json.dumps(wanted))

    def _file(self, number: int) -> Path:
        return self._folder / f"windows-{number:06d}.safetensors"


def _fields(top: Top) -> tuple[Tensor, Tensor, Tensor]:
    return top.ids, top.log_p, top.log_rest
