"""Importing this makes lm-evaluation-harness know the model `shortstack`: any of our runtimes.

lm-evaluation-harness (0.4.13) looks for models in a table of its own, not among entry points; the
command `shortstack lm-eval` imports this and then runs its command line. In Python the import is
all it takes: `lm_eval.simple_evaluate(model="shortstack", model_args={"path": ...})`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  # its own models: a table that is not empty is not filled later
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from shortstack.errors import ShortstackError, unknown
from shortstack.evaluate.codec import encode_pair, with_prefix
from shortstack.evaluate.scorer import Stop
from shortstack.evaluate.targets import Loading, target_of
from shortstack.terminal import display

MAX_ANSWER_TOKENS = 256
"""Where a task does not say: what lm-evaluation-harness itself takes."""


MODEL_ARGS = (
    *("path", "runtime", "threads", "context", "device", "dtype", "tokenizer"),
    "batch_tokens",
)


@register_model("shortstack")
class ShortstackLM(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """A checkpoint, a GGUF file, an ONNX folder or a folder of an export, in its own runtime."""

    def __init__(
        self,
        path: str = "",
        runtime: str = "",
        threads: int = 1,
        context: int = 2048,
        device: str | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        batch_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **others: object,
    ) -> None:
        """`batch_size` and `max_batch_size` come from the harness and change nothing: rows are
        batched by tokens. `device`: its own default is cuda:0, which means the CPU where there is
        no GPU, as for its model `hf`. Raises ShortstackError for what cannot be opened."""
        super().__init__()
        if others:
            raise unknown("model argument", min(others), MODEL_ARGS)
        if not path:
            raise ShortstackError("no model is named. Give it: --model_args path=MODEL")
        place = None if tokenizer is None else Path(tokenizer)
        self._target = target_of(Path(path), runtime=runtime, tokenizer=place)
        self._codec = self._target.codec()
        loading = Loading(int(context), int(threads), _present(device), dtype, batch_tokens)
        self._scorer = self._target.open(loading)

    @property
    def eot_token_id(self) -> int:
        return self._codec.start if self._codec.end is None else self._codec.end

    @property
    def prefix_token_id(self) -> int:
        return self._codec.start

    @property
    def max_length(self) -> int:
        return self._scorer.max_tokens

    @property
    def tokenizer_name(self) -> str:
        return self._target.label

    def get_model_info(self) -> dict[str, Any]:
        return {**self._scorer.info, "sha256": self._target.sha256, "path": self._target.path.name}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        bare = add_special_tokens is False
        return self._codec.encode(string) if bare else with_prefix(self._codec, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self._codec, context, continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with display(disable_tqdm).step("Score continuations") as progress:
            scored = self._scorer.log_likelihoods(pairs, progress)
        answers = [(-one.sum_nats, one.greedy) for one in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        pieces: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [(None, *make_disjoint_window(window)) for window in windows]
            pieces += made
            counts.append(len(made))
        values = iter(value for value, _ in self._loglikelihood_tokens(pieces, disable_tqdm))
        totals = [sum(next(values) for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        # requests of one task want the same: they are run together
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_wanted(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for (ends, limit), indices in alike.items():
            prompts = [with_prefix(self._codec, requests[index].args[0]) for index in indices]
            with display(disable_tqdm).step("Generate answers") as progress:
                found = self._scorer.generate(prompts, limit, self._stop(ends), progress)
            for index, ids in zip(indices, found, strict=True):
                said = self._codec.decode([token for token in ids if token != self._codec.end])
                answers[index] = _before(said, ends)
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _stop(self, ends: Sequence[str]) -> Stop:
        def stop(ids: list[int]) -> bool:
            if ids[-1] == self._codec.end:
                return True
            words = self._codec.decode(ids)
            return any(end in words for end in ends)

        return stop


def _wanted(given: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """(stop texts, most tokens) of a request. Raises ShortstackError for sampling."""
    if given.get("do_sample") and float(given.get("temperature", 1.0)) > 0:
        raise ShortstackError(
            "the task samples (do_sample); the model `shortstack` generates greedily. "
            "Give --gen_kwargs do_sample=False,temperature=0."
        )
    until = given.get("until") or []
    ends = [until] if isinstance(until, str) else list(until)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [int(given[name]) for name in names if given.get(name) is not None]
    return tuple(end for end in ends if end), (limits or [MAX_ANSWER_TOKENS])[0]


def _before(said: str, ends: Iterable[str]) -> str:
    for end in ends:
        said = said.split(end)[0]
    return said


def _present(device: str | None) -> str:
    import torch

    return device if device and torch.cuda.is_available() else "cpu"
