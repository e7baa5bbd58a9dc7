"""A tiny packed model through the runtime of packed files, for the doctor, in a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.doctor.probes import BATCH, CLOSE, check, tiny_llama, torch_lacks
from shortstack.errors import MissingExtraError

FORMS = {"cpu": ("direct", "int8", "stream"), "cuda": ("direct", "int8")}
"""Those with kernels or threads of their own."""
STEP_SIGMAS = 0.25
"""Steps of row codes in standard deviations: a few codes in a hundred lie outside 4 bits."""
NEXT = 5


def pytorch_packed(request: Mapping[str, Any]) -> dict[str, str]:
    """A batch and a token after it in every form, against the model of the same weights."""
    from shortstack.packed.runnable import PACKED, check_runnable

    try:
        check_runnable()
    except MissingExtraError as error:
        return {"lacks": str(error)}
    device = request["device"]
    lacks = torch_lacks(device)
    if lacks is not None:
        return {"lacks": lacks}
    forms = FORMS[device.partition(":")[0]]
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = _write_tiny(Path(scratch))
        right = _logits(folder, "pytorch", "cpu", {"dtype": "float32"})
        for form in forms:
            told = _logits(packed, PACKED, device, {"form": form})
            close = bool(abs(told - right).max() < CLOSE * right.std())
            check(f"{PACKED} with form={form} on {device}", close)
    return {"fact": f"runs a tiny packed Llama on {device}: {', '.join(forms)}"}


def _logits(path: Path, runtime: str, device: str, options: Mapping[str, str]) -> Any:
    """Of a batch and of the token after it, whose products have kernels of their own."""
    import numpy as np

    from shortstack.runtimes import open_session

    with open_session(
        path, runtime, threads=1, context_tokens=2 * BATCH, device=device, options=options
    ) as session:
        return np.stack([session.prefill(range(BATCH)), session.decode(NEXT)])


def _write_tiny(scratch: Path) -> tuple[Path, Path]:
    """(folder, packed file) of a random Llama whose matrices are row codes."""
    import numpy as np
    from safetensors.numpy import save_file

    from shortstack.checkpoint import SIDECAR, Checkpoint
    from shortstack.packed.choose import tries
    from shortstack.packed.file import write_packed
    from shortstack.row_codes import RowCodes

    folder, packed = scratch / "model", scratch / "model.packed.safetensors"
    model = tiny_llama()
    model.config.save_pretrained(folder)
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    sidecar: dict[str, Any] = {}
    for name, weights in tensors.items():
        if weights.ndim == 2:
            steps = (STEP_SIGMAS * weights.std(1)).astype(np.float16)
            rounded = np.rint(weights / steps.astype(np.float32)[:, None])
            made = RowCodes(np.clip(rounded, -127, 127).astype(np.int8), steps)
            tensors[name] = made.weights()
            sidecar |= {f"{name}.codes": made.codes, f"{name}.steps": made.steps}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(sidecar, folder / SIDECAR)
    write_packed(Checkpoint.open(folder), packed, tries("auto", "matching"))
    return folder, packed
