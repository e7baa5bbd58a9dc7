"""A checkpoint open in transformers, scored in batches, on the CPU or a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, one_line, require, unknown
from shortstack.evaluate.scorer import Pair, Scored, Stop, check_pairs
from shortstack.families import context_tokens
from shortstack.progress import OnProgress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
HEAD_ROWS = 512
"""Positions whose logits exist at a time: 100 MB in float32 at a vocabulary of 49,152."""
LEAST_SHARED = 16
"""A shorter shared beginning is run again for each choice: a pass of its own would cost more."""
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class _Row:
    """A sequence to run; positions from `first` on each predict the next of `targets`."""

    index: int
    tokens: tuple[int, ...]
    first: int
    targets: tuple[int, ...]


class TorchScorer:
    """Opens the folder of a checkpoint, or scores a model that is already in memory.

    Rows of about one length are run together, filled at their right end, which a causal model
    never looks at. Rows that begin alike (the choices of a question) share one pass over that
    beginning: its keys and values are kept and repeated.
    """

    def __init__(
        self,
        source: Path | Checkpoint | Any,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int | None = None,
        batch_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """`source`: a folder, a Checkpoint, or a loaded causal model of transformers (which stays
        on its device, in its dtype, and is put into its training mode again by `close`)."""
        require(("torch", "transformers"), "prune", "scoring a checkpoint")
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._model = _opened(source, device, dtype)
        self._was_training = self._model.training
        self._model.eval()
        self._device = next(self._model.parameters()).device
        config = self._model.config.get_text_config()
        self.max_tokens = max_tokens or _context(source, config)
        self._scale = 1 / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._halved = 0
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(self._device.type, 32768)

    @property
    def info(self) -> dict[str, Any]:
        import torch
        import transformers

        return {
            "runtime": "pytorch",
            "version": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(self._device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_tokens": self._batch_tokens,
            "batches_halved": self._halved,
        }

    def log_likelihoods(self, pairs: Sequence[Pair], progress: OnProgress = silent) -> list[Scored]:
        rows = []
        for index, (context, continuation) in enumerate(check_pairs(pairs, self.max_tokens)):
            # the last token predicts nothing that is asked for
            tokens = (*context, *continuation[:-1])
            rows.append(_Row(index, tokens, len(context) - 1, tuple(continuation)))
        return self._scored(rows, progress)

    def nats(self, windows: Sequence[list[int]], progress: OnProgress = silent) -> list[Scored]:
        pairs = [(window[:1], window[1:]) for window in windows]
        return self.log_likelihoods(pairs, progress)

    def log_probs(self, window: list[int]) -> NDArray[np.float32]:
        import torch

        with torch.no_grad():
            hidden = self._hidden(torch.tensor([window], device=self._device), None)[0]
            parts = [self._logits(part).log_softmax(-1).cpu() for part in hidden.split(HEAD_ROWS)]
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        stop: Stop,
        progress: OnProgress = silent,
    ) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        done = 0
        for batch in self._of_about_one_length(prompts, max_tokens):
            answers = self._continued([prompts[index] for index in batch], max_tokens, stop)
            for index, ids in zip(batch, answers, strict=True):
                found[index] = ids
            done += len(batch)
            progress(done, len(prompts))
        return found

    def _of_about_one_length(
        self, prompts: Sequence[list[int]], max_tokens: int
    ) -> Iterator[list[int]]:
        """Indices of prompts to run together: no longer than the shortest and an answer."""
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        batch: list[int] = []
        for index in order:
            length = len(prompts[index]) + max_tokens
            shortest = len(prompts[batch[0]]) if batch else length
            full = (len(batch) + 1) * length > self._batch_tokens
            if batch and (full or length > shortest + 2 * max_tokens):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _continued(
        self, prompts: Sequence[list[int]], max_tokens: int, stop: Stop
    ) -> list[list[int]]:
        """Answers to prompts of different lengths, nothing filled in.

        All begin with as many tokens as the shortest has; a longer one then takes its own tokens
        where a shorter one already takes what the model says.
        """
        import torch
        from transformers import DynamicCache

        room = max(1, self.max_tokens - max_tokens)
        prompts = [prompt[-room:] for prompt in prompts]
        shortest = min(map(len, prompts))
        found: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        following = [prompt[:shortest] for prompt in prompts]
        cache, at = DynamicCache(), shortest
        with torch.no_grad():
            while not all(ended):
                tokens = torch.tensor(following, device=self._device)
                said = self._logits(self._hidden(tokens, cache)[:, -1]).argmax(-1).tolist()
                for row, prompt in enumerate(prompts):
                    if at < len(prompt):
                        said[row] = prompt[at]
                    elif not ended[row]:
                        found[row].append(said[row])
                        ended[row] = stop(found[row]) or len(found[row]) == max_tokens
                following, at = [[token] for token in said], at + 1
        return found

    def _scored(self, rows: list[_Row], progress: OnProgress) -> list[Scored]:
        found: list[Scored | None] = [None] * len(rows)
        done = 0
        groups = list(_groups(rows))
        for batch in _batches(groups, lambda: self._batch_tokens):
            for row, scored in self._run_or_halve(batch):
                found[row.index] = scored
                done += 1
            progress(done, len(rows))
        return [scored for scored in found if scored is not None]

    def _run_or_halve(self, groups: list[_Group]) -> list[tuple[_Row, Scored]]:
        """Score groups; where memory does not hold them, in two halves, and say so in `info`."""
        import torch

        try:
            return list(self._run(groups))
        except torch.OutOfMemoryError as error:
            words = one_line(str(error), 200)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(groups) == 1:
            raise ShortstackError(
                f"out of memory on {self._device} with one question or window at a time: {words} "
                "Give shorter rows, a smaller --dtype, or another --device."
            )
        self._batch_tokens = max(1, self._batch_tokens // 2)
        self._halved += 1
        half = len(groups) // 2
        return self._run_or_halve(groups[:half]) + self._run_or_halve(groups[half:])

    def _run(self, groups: list[_Group]) -> Iterator[tuple[_Row, Scored]]:
        """Score groups with one shared beginning each, all of one length."""
        import torch

        shared = min(group.shared for group in groups)
        rows = [row for group in groups for row in group.rows]
        with torch.no_grad():
            cache = self._beginnings(groups, shared)
            tails = [row.tokens[shared:] for row in rows]
            longest = max(map(len, tails))
            tokens = torch.zeros((len(rows), longest), dtype=torch.long)
            for at, tail in enumerate(tails):
                tokens[at, : len(tail)] = torch.tensor(tail)
            hidden = self._hidden(tokens.to(self._device), cache)
            wanted = torch.cat(
                [
                    hidden[at, row.first - shared : row.first - shared + len(row.targets)]
                    for at, row in enumerate(rows)
                ]
            )
            targets = torch.tensor([t for row in rows for t in row.targets], device=self._device)
            nats, top = self._surprise(wanted, targets)
        start = 0
        for row in rows:
            part = slice(start, start + len(row.targets))
            start += len(row.targets)
            yield row, Scored(float(nats[part].sum()), len(row.targets), bool(top[part].all()))

    def _beginnings(self, groups: list[_Group], shared: int) -> Any:
        """Keys and values of each group's beginning, repeated for each of its rows."""
        import torch
        from transformers import DynamicCache

        if not shared:
            return None
        cache = DynamicCache()
        tokens = torch.tensor([group.rows[0].tokens[:shared] for group in groups])
        self._hidden(tokens.to(self._device), cache)
        counts = [len(group.rows) for group in groups]
        if max(counts) > 1:
            rows = [at for at, count in enumerate(counts) for _ in range(count)]
            cache.batch_select_indices(torch.tensor(rows, device=self._device))
        return cache

    def _hidden(self, tokens: Tensor, cache: Any) -> Tensor:
        """What the last norm gives, shape (rows, length, width). The cache grows by `tokens`."""
        decoder = self._model.get_decoder()
        result = decoder(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        hidden: Tensor = result.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden).float() * self._scale
        if self._cap:
            logits = (logits / self._cap).tanh() * self._cap
        return logits

    def _surprise(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(target) in nats (float64) and whether the target is the likeliest, both (n,)."""
        import torch

        nats, top = [], []
        for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = self._logits(rows)
            picked = logits.gather(1, wanted[:, None])[:, 0]
            nats.append((logits.logsumexp(-1) - picked).double())
            top.append(logits.argmax(-1) == wanted)
        return torch.cat(nats).cpu(), torch.cat(top).cpu()

    def close(self) -> None:
        self._model.train(self._was_training)
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Group:
    """Rows whose first `shared` tokens are alike and predict nothing that is asked for."""

    rows: tuple[_Row, ...]
    shared: int

    @property
    def cost(self) -> int:
        """Tokens to run, about."""
        return sum(len(row.tokens) for row in self.rows)


def _groups(rows: Sequence[_Row]) -> Iterator[_Group]:
    """Neighbours that begin alike, as the choices of one question do."""
    start = 0
    while start < len(rows):
        end, shared = start + 1, rows[start].first
        while end < len(rows):
            common = min(_common(rows[start].tokens, rows[end].tokens), rows[end].first, shared)
            # most of the context alike: the same question, not another one that begins "Question:"
            if common < max(LEAST_SHARED, rows[end].first // 2):
                break
            end, shared = end + 1, common
        yield _Group(tuple(rows[start:end]), shared if end - start > 1 else 0)
        start = end


def _batches(groups: Sequence[_Group], limit: Callable[[], int]) -> Iterator[list[_Group]]:
    """Groups of about one length together, long ones first: what does not fit fails at once.

    `limit` says how many tokens a batch may have, asked anew for each.
    """
    order = sorted(groups, key=lambda group: (-group.shared, -group.cost))
    batch: list[_Group] = []
    n_rows = width = 0
    for group in order:
        n_rows += len(group.rows)
        width = max(width, *(len(row.tokens) for row in group.rows))
        # what a group shares beyond the batch's least is run again for each of its rows
        waste = batch[0].shared - group.shared if batch else 0
        if batch and (n_rows * width > limit() or waste > LEAST_SHARED):
            yield batch
            batch, n_rows, width = [], len(group.rows), max(len(row.tokens) for row in group.rows)
        batch.append(group)
    if batch:
        yield batch


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))


def check_loading(device: str, dtype: str) -> None:
    """Raise ShortstackError for a device that is not here and a dtype that we do not open."""
    require(("torch", "transformers"), "prune", "scoring a checkpoint")
    import torch

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise unknown("device", device, ("cpu", "cuda", "cuda:1"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and not count:
        raise ShortstackError(
            "PyTorch sees no GPU here. Use --device cpu, or run: shortstack doctor"
        )
    if int(device.partition(":")[2] or 0) >= max(1, count):
        raise ShortstackError(
            f"there is no device {device!r}: PyTorch sees {count} GPUs, counted from 0. "
            "Choose another --device."
        )


def _opened(source: Any, device: str, dtype: str) -> Any:
    import torch

    from shortstack.pretrained import load

    if not isinstance(source, str | os.PathLike | Checkpoint):
        return source
    check_loading(device, dtype)
    path = source.path if isinstance(source, Checkpoint) else Path(source)
    return load(path, getattr(torch, dtype)).to(device)


def _context(source: Any, config: Any) -> int:
    """How many tokens the model was made for."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(source, Checkpoint):
        limit = context_tokens(source.config, windowed=True)
    return int(limit or DEFAULT_CONTEXT)
