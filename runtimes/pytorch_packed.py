"""A packed model run as it lies: matrices stay coded, or in few bits, while the model runs.

docs/packed_runtime.md says what the forms cost; `packed/` holds them.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

from shortstack.errors import MissingExtraError, ShortstackError, require
from shortstack.intake import is_packed
from shortstack.packed.plan_file import PlanFile, read_plan
from shortstack.packed.resident import Resident
from shortstack.runtimes.pytorch import PyTorchSession

AUTO = "auto"
NONE = "none"


class Packed:
    """Opens a packed file for a PyTorchSession: its `loader`. Keeps what lives as long as the
    session does."""

    def __init__(self, *, form: str, head: str, workers: str, threads: int, plan: PlanFile | None):
        self._form, self._head, self._plan = form, head, plan
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        free = max(0, min(4, cores - threads))  # more would take the cores that multiply
        self._workers = free if workers == AUTO else int(workers)
        self.folder = tempfile.TemporaryDirectory(prefix="shortstack-packed-")
        self.forms: dict[str, str] = {}
        """Of every matrix of the model, by tensor name."""
        self.matrices: dict[str, Any] = {}
        """Those that are packed; of matrices that are held as one by the name of the first."""
        self.members: dict[str, tuple[str, ...]] = {}
        """Their tensors, by the same name."""
        self.ring: Any = None

    def __call__(self, path: Path, *, dtype: str, device: Any) -> tuple[Any, dict[str, Any]]:
        import torch

        from shortstack.runtimes.packed.forms import Place, assigned, check_planned
        from shortstack.runtimes.packed.model import fill, skeleton, slots_of
        from shortstack.runtimes.packed.rest import Scratch
        from shortstack.runtimes.packed.stream import Ring

        resident = Resident(path)
        resident.write_files(Path(self.folder.name))
        kind = getattr(torch, dtype)
        with torch.inference_mode(False), torch.no_grad():
            model = skeleton(Path(self.folder.name), kind)
            slots = slots_of(model, resident)
            if self._plan is not None:
                forms = self._plan.forms_for(resident.sha256, slots)
                check_planned(forms, slots, resident, torch.device(device))
            else:
                forms = assigned(slots, resident, self._form, self._head, device)
            self.forms = forms
            self.ring = Ring(self._workers)
            self.scratch = Scratch()
            place = Place(kind, device, self.ring, self.scratch)
            self.matrices, self.members = fill(model, resident, slots, forms, place)
        return_memory()
        return model, self._facts(model, forms)

    def _facts(self, model: Any, forms: dict[str, str]) -> dict[str, Any]:
        from shortstack.runtimes.packed.matrix import shared_bytes

        rest = sum(parameter.nbytes for parameter in model.parameters())
        held = sum(matrix.n_bytes for matrix in self.matrices.values())
        self.scratch.take(0)  # arrays are there from now on
        buffers = self.ring.n_bytes + self.scratch.n_bytes + shared_bytes(self.matrices.values())
        table = model.get_input_embeddings()
        head = model.get_output_embeddings()
        gathered = getattr(table, "matrix", None) or table.weight
        used = getattr(head, "matrix", None) or head.weight
        n_gathered = getattr(gathered, "n_bytes", None) or gathered.nbytes
        return {
            "form": "plan" if self._plan is not None else self._form,
            "head": self._head,
            "forms": dict(Counter(forms.values())),
            "workers": self._workers,
            "buffer_bytes": buffers,
            "weight_bytes": rest + held + buffers,
            "weight_bytes_per_token": rest + held - (0 if used is gathered else n_gathered),
        }

    def close(self) -> None:
        if self.ring is not None:
            self.ring.close()
        self.matrices = {}
        self.folder.cleanup()


class Running:
    """What sessions of packed files share, with a graph or without: behind PyTorchSession."""

    RUNTIME = "pytorch-packed"
    packed: Packed
    _info: dict[str, Any]

    def __init__(self, path: Path, *, packed: Packed, **more: Any) -> None:
        self.packed = packed
        try:
            super().__init__(path, loader=packed, **more)  # type: ignore[call-arg]  # of the other base
        except BaseException:
            packed.close()
            raise
        self._tokenizer_file = Path(packed.folder.name) / "tokenizer.json"
        self._info.pop("quantize")

    def close(self) -> None:
        super().close()  # type: ignore[misc]  # of the other base
        self._model: Any = None
        self.packed.close()


class PackedSession(Running, PyTorchSession):
    """A packed file open in PyTorch."""


def return_memory() -> None:
    """Give back what loading freed: glibc keeps freed memory, which would count as the model's."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return  # no glibc: nothing to trim


def open_session(
    path: Path,
    *,
    threads: int,
    context_tokens: int,
    device: str = "cpu",
    batch: int = 1,
    dtype: str = "bfloat16",
    form: str = AUTO,
    head: str = AUTO,
    workers: str = AUTO,
    plan: str = NONE,
    memory_budget_mb: str = NONE,
    max_slowdown: str = NONE,
    cuda_graph: str = "off",
) -> PyTorchSession:
    _check_packages()
    if not path.is_file() or not is_packed(path):
        raise ShortstackError(
            f"pytorch-packed cannot open {path}: it is no packed file. Pack a model: "
            "shortstack export MODEL --to packed -o OUT"
        )
    budget = None if memory_budget_mb == NONE else float(memory_budget_mb)
    slowdown = None if max_slowdown == NONE else float(max_slowdown)
    chosen = None if plan == NONE else read_plan(Path(plan))
    if budget is not None or slowdown is not None:
        from shortstack.runtimes.packed.fit import fit
        from shortstack.runtimes.packed.measuring import Setting

        _check_alone(form, head, plan)
        setting = Setting(path, threads, device, dtype, workers, cuda_graph)
        chosen = fit(setting, memory_budget_mb=budget, max_slowdown=slowdown, points=0)
    elif chosen is not None:
        _check_alone(form, head)
    kind: Any = PackedSession
    if cuda_graph == "on":
        from shortstack.runtimes.packed.graph import PackedGraphSession as kind
    return cast(
        PyTorchSession,
        kind(
            path,
            packed=Packed(form=form, head=head, workers=workers, threads=threads, plan=chosen),
            threads=threads,
            context_tokens=context_tokens,
            device=device,
            batch=batch,
            dtype=dtype,
        ),
    )


def _check_alone(form: str, head: str, plan: str = NONE) -> None:
    if (form, head, plan) != (AUTO, AUTO, NONE):
        raise ShortstackError(
            "forms come from a plan or a budget here: leave out form and head, and name a plan or "
            "a budget, not both."
        )


def _check_packages() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "prune", "running a packed model") from None
    require(("zstandard",), "pack", "running a packed model")
