"""A model of transformers without weights, filled from a packed file: matrices in their forms, all
else as tensors. No folder is unpacked and no model of full size is ever in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortstack.errors import ShortstackError
from shortstack.packed.resident import Resident
from shortstack.pretrained import attention_of, config_of, of_decoder
from shortstack.runtimes.packed.forms import PLAIN, TORCH_TYPES, Place, Slot, make
from shortstack.runtimes.packed.matrix import Matrix
from shortstack.runtimes.packed.modules import PackedEmbedding, PackedLinear
from shortstack.runtimes.packed.together import groups, put_together

WEIGHT = ".weight"


def skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The model that config.json in `folder` describes, its parameters without memory."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = config_of(folder)
    with _without_weights():
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False, **attention_of(config)
        )
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters are made on the device `meta`. Buffers are not: rotary frequencies are computed
    when a model is made, and no file holds them."""
    real = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        real(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = real  # type: ignore[method-assign]  # what it was


def slots_of(model: Any, resident: Resident) -> dict[str, Slot]:
    """Matrices by tensor name, in the order of their use: embeddings, the layers', the head.

    Raises ShortstackError where the model has a tensor that the file has not, or of other shape.
    """
    _check_names(model, resident)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is table.weight
    found: dict[str, Slot] = {}
    last: dict[str, Slot] = {}
    for name, module in model.named_modules():
        tensor = name + WEIGHT
        if tensor not in resident.tensors or not of_decoder(name):
            continue
        if type(module) is nn.Linear:
            into = last if module is head else found
            into[tensor] = Slot(tensor, multiplied=True, head=module is head)
        elif module is table and isinstance(module, nn.Embedding):
            into = last if tied else found
            into[tensor] = Slot(tensor, multiplied=tied, head=tied)
    return found | last


def _check_names(model: Any, resident: Resident) -> None:
    ties = set(getattr(model, "_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        entry = resident.tensors.get(name)
        if entry is None and name not in ties:
            raise ShortstackError(
                f"{resident.path} has no tensor {name}, which transformers wants of it: its "
                f"tensors are named otherwise. Unpack it: shortstack unpack {resident.path} -o OUT"
            )
        if entry is not None and entry.shape != tuple(tensor.shape):
            raise ShortstackError(
                f"{resident.path}: {name} is {list(entry.shape)}, config.json wants "
                f"{list(tensor.shape)}. Pack the model again."
            )


def fill(
    model: Any,
    resident: Resident,
    slots: Mapping[str, Slot],
    forms: Mapping[str, str],
    place: Place,
) -> tuple[dict[str, Matrix], dict[str, tuple[str, ...]]]:
    """Read the file into the model, in place.

    Returns the packed matrices by tensor name, of those that are held as one by the first's, and
    for each of these the tensors that it is made of.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is table.weight
    matrices: dict[str, Matrix] = {}
    members: dict[str, tuple[str, ...]] = {}
    for names in groups(slots, forms, resident, place.dtype):
        name = names[0]
        if forms[name] == PLAIN:
            continue
        matrix = matrices[name] = make(
            resident, names, forms[name], place, ring=slots[name].multiplied
        )
        members[name] = names
        if len(names) > 1:
            put_together(model, matrix, names)
            continue
        module = model.get_submodule(name.removesuffix(WEIGHT))
        if isinstance(module, nn.Embedding):
            _replace(model, module, PackedEmbedding(matrix, getattr(module, "embed_scale", None)))
            module = head if tied else None
        if module is not None:
            bias = getattr(module, "bias", None)
            _replace(model, module, PackedLinear(matrix, bias))
    _fill_rest(model, resident, place)
    place.ring.start()
    return matrices, members


def _replace(model: Any, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, new)


def _fill_rest(model: Any, resident: Resident, place: Place) -> None:
    """All tensors of the file that no matrix took, in the session's type."""
    filled: dict[int, nn.Parameter] = {}  # tied parameters once
    for name, tensor in list(model.named_parameters(remove_duplicate=False)):
        above, _, last = name.rpartition(".")
        if id(tensor) not in filled:
            values = _read(resident, name).to(place.device, place.dtype)
            filled[id(tensor)] = nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(above), last, filled[id(tensor)])
    for name, buffer in list(model.named_buffers()):
        if name in resident.tensors:
            buffer.copy_(_read(resident, name))
    model.to(place.device)


def _read(resident: Resident, name: str) -> torch.Tensor:
    if name not in resident.tensors:
        raise ShortstackError(f"{resident.path} has no tensor {name}. Pack the model again.")
    entry = resident.tensors[name]
    if not entry.n_elements:
        return torch.empty(entry.shape, dtype=TORCH_TYPES[entry.dtype])
    plain = torch.from_numpy(resident.floats(name))
    return plain.view(TORCH_TYPES[entry.dtype]).view(entry.shape)
