"""The devices that the installed llama.cpp can compute on, by its own list; asked in a child.

Metal, ROCm and Vulkan reach us this way. A graphics driver may crash whoever loads it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from typing import Any

from shortstack import child
from shortstack.devices.nvidia import ORDER
from shortstack.errors import ShortstackError, one_line

TIMEOUT_S = 60.0
CPU, ACCELERATOR = 0, 3
"""ggml_backend_dev_type; an accelerator (BLAS, AMX) works for the CPU, it is no device."""

KINDS = {"mtl": "metal", "gpuopencl": "opencl", "hip": "rocm"}
"""What llama.cpp calls a backend in a device's name, where we call it otherwise."""


def devices() -> tuple[list[dict[str, Any]], str | None]:
    """Graphics devices and None, or none and the reason.

    Each: `id` (such as metal:0), `kind`, `name`, `vram_bytes` (None if not told), `llama_cpp` (the
    name that llama.cpp gives it).
    """
    try:
        answer = child.call(
            "shortstack.llama_devices:backend_list",
            {},
            timeout_s=TIMEOUT_S,
            what="llama.cpp",
            env=ORDER,
        )
    except ShortstackError as error:
        return [], one_line(str(error))
    found = [_device(one) for one in answer["devices"] if one["type"] not in (CPU, ACCELERATOR)]
    return found, None if found else "the installed llama.cpp is built for the CPU alone"


def backend_list(request: Mapping[str, Any]) -> dict[str, Any]:
    """In a child: llama.cpp's list (ggml-backend.h): name, description, type, total bytes."""
    return {"devices": [_facts(device) for device in handles().values()]}


def handles() -> dict[str, int]:
    """Name -> pointer of every device of the loaded llama.cpp. Raises MissingExtraError."""
    from shortstack.libllama import libllama

    libllama()
    ggml = _ggml()
    ggml.ggml_backend_load_all()
    pointers = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    return {ggml.ggml_backend_dev_name(pointer).decode(): pointer for pointer in pointers}


def named(device: str) -> tuple[str, int] | None:
    """llama.cpp's own name and pointer of a device such as `cuda:1`; None where this build cannot
    compute on it. Its list is filtered and in an order of its own, so a number alone names nothing.
    """
    from shortstack.libllama import libllama

    if not libllama().llama_supports_gpu_offload():
        return None
    found = ((n, pointer) for n, pointer in handles().items() if device_id(n) == device)
    return next(found, None)


def use_only(params: Any, *pointers: int) -> Any:
    """Set `llama_model_params.devices`: these, and none but the CPU where no pointer is given; left
    alone a build for cards takes theirs, for the CPU's part, too. Keep what this returns until the
    model is loaded."""
    chosen = (ctypes.c_void_p * (len(pointers) + 1))(*pointers, None)  # ends with a null
    params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    return chosen


def device_id(llama_name: str) -> str:
    """`CUDA0` is cuda:0, `MTL0` and `Metal` are metal:0."""
    letters, number = re.fullmatch(r"(.*?)(\d*)", llama_name).groups()  # type: ignore[union-attr]  # fits any text
    kind = letters.lower()
    return f"{KINDS.get(kind, kind)}:{number or 0}"


def _device(told: Mapping[str, Any]) -> dict[str, Any]:
    identity = device_id(told["name"])
    return {
        "id": identity,
        "kind": identity.partition(":")[0],
        "name": told["description"],
        "vram_bytes": told["total_bytes"] or None,
        "llama_cpp": told["name"],
    }


def _facts(pointer: int) -> dict[str, Any]:
    ggml = _ggml()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(pointer, ctypes.byref(free), ctypes.byref(total))
    return {
        "name": ggml.ggml_backend_dev_name(pointer).decode(),
        "description": ggml.ggml_backend_dev_description(pointer).decode(),
        "type": ggml.ggml_backend_dev_type(pointer) & 0xFF,  # a packed enumeration in some builds
        "total_bytes": total.value,
    }


def _ggml() -> Any:
    """libggml, as llama-cpp-python loaded it, with the types of what we call."""
    from llama_cpp._ggml import libggml

    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    sizes = [pointer, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    for name, result, arguments in (
        ("load_all", None, []),
        ("dev_count", ctypes.c_size_t, []),
        ("dev_get", pointer, [ctypes.c_size_t]),
        ("dev_name", text, [pointer]),
        ("dev_description", text, [pointer]),
        ("dev_type", ctypes.c_int, [pointer]),
        ("dev_memory", None, sizes),
    ):
        function = getattr(libggml, f"ggml_backend_{name}")
        function.restype, function.argtypes = result, arguments
    return libggml
