"""Errors that a user can mend, between processes."""

from __future__ import annotations

import copy

import pytest

from shortstack.child import ChildCrashError
from shortstack.errors import (
    MissingExtraError,
    SettingError,
    ShortstackError,
    VerificationError,
)


@pytest.mark.parametrize(
    "error",
    [
        ShortstackError("a folder is not there. Name another."),
        SettingError("every", "must be at least 1"),
        VerificationError("the artifact answers otherwise."),
        MissingExtraError("mobius", "onnx", "ONNX export"),
        ChildCrashError("a child", "died", "one\ntwo", kind="signal", signal_name="SIGSEGV"),
    ],
)
def test_an_error_of_a_pools_worker_arrives_as_it_was(error: ShortstackError) -> None:
    """A pool that cannot read what its worker raised calls itself broken, and says nothing else."""
    found = copy.copy(error)  # by __reduce__, as a pool sends it
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.__dict__ == error.__dict__
