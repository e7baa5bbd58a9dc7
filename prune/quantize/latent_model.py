"""A model whose matrices are codes times steps while it learns both, norms and biases too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.prune.heal.model import is_gone, stored_name
from shortstack.prune.quantize.latent import (
    codes_of,
    grouped_counts,
    latent_gradients,
    latent_start,
)
from shortstack.prune.quantize.rate import GROUPS, bits_of_counts
from shortstack.prune.quantize.uniform import LEAST_STEP
from shortstack.row_codes import CODE_MAX, STEP_BITS, RowCodes, RowCodesReader

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LatentMatrix:
    """One matrix: what the model multiplies with, `weight`, is made of the others.

    `latent`: codes before rounding, (rows, columns); `factors`, (rows,), on `base`, the steps of
    the start. A step is the float16 nearest to its product.
    """

    weight: nn.Parameter
    latent: nn.Parameter
    factors: nn.Parameter
    base: Tensor

    @property
    def steps(self) -> Tensor:
        """As they are stored, float32, (rows,)."""
        return (self.base * self.factors.detach()).clamp_min(LEAST_STEP).half().float()

    @property
    def codes(self) -> Tensor:
        return codes_of(self.latent.detach(), CODE_MAX).to(torch.int8)

    def put(self) -> None:
        """Give the model codes times steps."""
        made = codes_of(self.latent.detach(), CODE_MAX).mul_(self.steps[:, None])
        self.weight.data.copy_(made)

    def take_gradient(self) -> None:
        """Pass the weight's gradient on to latent codes and factors."""
        assert self.weight.grad is not None
        steps, factors = self.steps, self.factors.detach()
        weight = self.weight.detach()
        found = latent_gradients(self.weight.grad, weight, steps, factors)
        self.latent.grad, self.factors.grad = found
        self.weight.grad = None

    def bits(self) -> float:
        """As `rate.rate_of` has them: codes, tables, steps and groups of rows."""
        codes = self.codes
        bits, per_row, tables = bits_of_counts(list(grouped_counts(codes, GROUPS)), len(codes))
        return bits + (STEP_BITS + per_row) * len(codes) + tables

    def stretch(self, factor: float) -> None:
        """Make steps larger by a factor, weights left as they are up to rounding."""
        self.base.mul_(factor)
        self.latent.data.div_(factor)

    def bound(self) -> None:
        """Keep latent codes where a code is near."""
        self.latent.data.clamp_(-CODE_MAX - 0.5, CODE_MAX + 0.5)


@dataclass(frozen=True)
class LatentVector:
    """A norm or bias: `used` by the model as its type stores it, `latent` in float32."""

    used: nn.Parameter
    latent: nn.Parameter
    stored: torch.dtype

    def put(self) -> None:
        self.used.data.copy_(self.latent.detach().to(self.stored))

    def take_gradient(self) -> None:
        self.latent.grad, self.used.grad = self.used.grad, None


@dataclass(frozen=True)
class Snapshot:
    """A state as it would be written; on the CPU, a byte a weight."""

    matrices: dict[str, RowCodes]
    vectors: dict[str, Tensor]


class LatentModel:
    """The checkpoint in float32 on `device`, its matrices as the sidecar in `folder` has them.

    `kept`: matrices of the sidecar that do not learn, those of sub-blocks that were removed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        device: torch.device,
        vectors: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = load(checkpoint.path, torch.float32).to(device).requires_grad_(False)
        sidecar = RowCodesReader(folder)
        self.matrices: dict[str, LatentMatrix] = {}
        self.vectors: dict[str, LatentVector] = {}
        for own, parameter in self.module.named_parameters():
            name = stored_name(own, checkpoint)
            if name not in checkpoint.tensors or is_gone(name, checkpoint):
                continue
            if name in sidecar.shapes:
                self.matrices[name] = _matrix(parameter, sidecar.read(name))
            elif parameter.ndim == 1:
                dtype = STORED[checkpoint.tensors[name].dtype]
                self.vectors[name] = _vector(parameter, dtype, (vectors or {}).get(name))
        self.kept = {n: sidecar.read(n) for n in sidecar.names if n not in self.matrices}
        del sidecar  # it maps a file that is written later
        self.put()

    @property
    def parts(self) -> Iterator[LatentMatrix | LatentVector]:
        yield from self.matrices.values()
        yield from self.vectors.values()

    def put(self) -> None:
        """Give the model what the latent values stand for."""
        for part in self.parts:
            part.put()

    def learnt(self) -> dict[str, nn.Parameter]:
        """Everything that an optimizer changes, by a name of its own."""
        found: dict[str, nn.Parameter] = {}
        for name, matrix in self.matrices.items():
            found[f"{name}.latent"], found[f"{name}.factors"] = matrix.latent, matrix.factors
        return found | {name: vector.latent for name, vector in self.vectors.items()}

    def bits(self) -> float:
        """Of all matrices, those that do not learn too."""
        return sum(m.bits() for m in self.matrices.values()) + self._kept_bits

    @property
    def _kept_bits(self) -> float:
        total = 0.0
        for made in self.kept.values():
            counts = grouped_counts(torch.from_numpy(made.codes), GROUPS)
            bits, per_row, tables = bits_of_counts(list(counts), len(made.codes))
            total += bits + (STEP_BITS + per_row) * len(made.codes) + tables
        return total

    @property
    def n_codes(self) -> int:
        return sum(m.latent.numel() for m in self.matrices.values())

    def snapshot(self) -> Snapshot:
        made = {
            name: RowCodes(m.codes.cpu().numpy(), m.steps.half().cpu().numpy())
            for name, m in self.matrices.items()
        }
        vectors = {n: v.latent.detach().to(v.stored).cpu() for n, v in self.vectors.items()}
        return Snapshot(made, vectors)


def _matrix(weight: nn.Parameter, start: RowCodes) -> LatentMatrix:
    codes = torch.tensor(start.codes, device=weight.device)  # a copy: what is read may be locked
    base = torch.from_numpy(start.steps.astype(np.float32)).to(weight.device)
    latent = nn.Parameter(latent_start(weight.detach(), codes, base))
    weight.requires_grad_(True)
    return LatentMatrix(weight, latent, nn.Parameter(torch.ones_like(base)), base)


def _vector(used: nn.Parameter, stored: torch.dtype, start: Any) -> LatentVector:
    latent = used.detach().clone() if start is None else torch.as_tensor(start).to(used.device)
    used.requires_grad_(True)
    return LatentVector(used, nn.Parameter(latent), stored)
