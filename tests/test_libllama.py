"""How libllama comes into the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

SEEN_BY_ALL = """
import ctypes, numpy
from shortstack.libllama import libllama
print(hasattr(ctypes.CDLL(None), "_ZSt9terminatev"))
libllama()
print(hasattr(ctypes.CDLL(None), "_ZSt9terminatev"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RTLD_GLOBAL decides this on Linux alone")
def test_there_is_one_cxx_runtime_for_all_libraries() -> None:
    """Without it a build that brings its own dies in std::regex, beside NumPy."""
    done = subprocess.run(
        [sys.executable, "-c", SEEN_BY_ALL], capture_output=True, text=True, check=True
    )
    before, after = done.stdout.split()
    if before == "True":
        pytest.skip("this Python shares its C++ runtime anyway")
    assert after == "True"
