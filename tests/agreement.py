"""How far a runtime is from float32 PyTorch, in one process: what several test files share."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.runtimes import open_session

TOKENS = [(37 * index + 11) % 512 for index in range(64)]
"""Three quarters are a prompt three times the zoo's window; the others are decoded one by one."""


def run(path: Path, runtime: str, n_tokens: int = len(TOKENS)) -> NDArray[np.float32]:
    """Logits at every position: a prompt at once, the last quarter token by token."""
    prompt = n_tokens * 3 // 4
    with open_session(path, runtime, threads=1, context_tokens=n_tokens) as session:
        rows = [*session.prefill(TOKENS[:prompt], all_logits=True)]
        rows += [session.decode(token) for token in TOKENS[prompt:n_tokens]]
    return np.array(rows)


def distance(found: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Largest difference of a logit, in units of the largest logit."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def in_process(function: str, request: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """`child.call` without the process: it would import torch anew for each of many models."""
    module, name = function.split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer: dict[str, Any] = getattr(importlib.import_module(module), name)(
            json.loads(json.dumps(request))
        )
    return answer
