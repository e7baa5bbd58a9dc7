"""A workload checks itself; a prompt is known by its hash."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shortstack.devices.host import usable_cores
from shortstack.devices.workload import Prompt, Workload, warmup_tokens
from shortstack.errors import ShortstackError


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens": 0},
        {"decode_tokens": 1},
        {"repeats": 0},
        {"threads": 0},
        {"memory_repeats": -1},
        {"repeats": 2.5},
        {"threads": True},
        {"depth_tokens": -1},
        {"batch": 0},
        {"cooldown_s": -1.0},
        {"cooldown_s": float("nan")},
        {"time_budget_s": "long"},
    ],
)
def test_a_wrong_number_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ShortstackError, match=next(iter(wrong))):
        Workload(**wrong)


def test_threads_default_to_the_cores_we_may_use() -> None:
    assert Workload().threads == usable_cores() >= 1


def test_the_context_holds_prompt_first_token_and_decoded_ones() -> None:
    short = Workload(prompt_tokens=100, decode_tokens=20, warmup_decode_tokens=8, threads=1)
    assert short.context_tokens == 121
    assert dataclasses.replace(short, depth_tokens=30).context_tokens == 151
    long_warmup = Workload(prompt_tokens=100, decode_tokens=2, warmup_decode_tokens=50, threads=1)
    assert long_warmup.context_tokens == 151


def test_round_trip() -> None:
    workload = Workload(prompt_tokens=3, threads=2)
    assert Workload.from_dict(workload.to_dict()) == workload


def test_a_prompt_is_known_by_its_tokens_not_its_source() -> None:
    assert Prompt((1, 2), "a").sha256 == Prompt((1, 2), "b").sha256
    assert Prompt((1, 2), "a").sha256 != Prompt((2, 1), "a").sha256


def test_the_warm_up_prompt_is_as_long_as_the_measured_one_but_bounded_on_the_cpu() -> None:
    assert warmup_tokens(512, "cpu") == 512
    assert warmup_tokens(8192, "cpu") == 1024
    assert warmup_tokens(8192, "cuda:0") == 8192
