"""Packed forms on a real NVIDIA card. Skips, and says why, where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.packed_models import pack, write_coded

from shortstack.row_codes import RowCodes
from shortstack.runtimes import open_session
from shortstack.runtimes.packed.card import CardDirectMatrix
from shortstack.runtimes.packed.int8 import Int8Matrix

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this PyTorch sees no card: the kernels were not tried"
)
PROMPT = [1, 50, 60, 70, 300, 20, 19]
N = 24


def matrix(rows: int, columns: int) -> RowCodes:
    """Rows of unlike spread; one holds every code, two nothing but escapes, one zeros, and one
    zeros but for one code."""
    rng = np.random.default_rng(0)
    codes = np.clip(
        np.rint(rng.normal(0, rng.uniform(1, 9, (rows, 1)), (rows, columns))), -127, 127
    )
    codes[1], codes[2], codes[3] = rng.integers(-128, 128, columns), 127, 0
    codes[4], codes[5], codes[5, columns // 3] = -128, 0, 1
    return RowCodes(codes.astype(np.int8), rng.uniform(0.01, 0.02, rows).astype(np.float16))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(64, 64), (1000, 576), (9, 577), (130, 11008), (512, 4096), (4096, 4096), (70, 16387)],
)
@pytest.mark.parametrize("kind", [CardDirectMatrix, Int8Matrix])
def test_the_kernels_multiply_by_the_codes(
    kind: type[CardDirectMatrix] | type[Int8Matrix], rows: int, columns: int
) -> None:
    made = matrix(rows, columns)
    weights = torch.from_numpy(made.weights()).double()
    device = torch.device("cuda:0")
    with torch.inference_mode():
        held = kind(made, torch.bfloat16, device)
        torch.testing.assert_close(held.codes(0, rows).cpu(), torch.from_numpy(made.codes))
        for m in (1, 3, 40):
            x = torch.randn(m, columns).bfloat16()
            found = held.multiply(x.to(device)).cpu().double()
            truth = x.double() @ weights.T
            # of one product: the sum is float32, the result is rounded once to 8 bits (twice in
            # a prompt, of which the unscaled sum is rounded, too)
            scale = x.abs().double() @ weights.abs().T
            assert ((found - truth).abs() <= truth.abs() * 2**-7 + scale * 1e-5).all()
            assert (found[:, 3] == 0).all()
        ids = torch.tensor([3, rows - 1, 0], device=device)
        truth = weights.float()[ids.cpu()].bfloat16()
        torch.testing.assert_close(held.gather(ids).cpu(), truth, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1448, 4096])
def test_every_configuration_of_the_kernel_computes_the_same(columns: int) -> None:
    """Those that were not the quickest here may be so on another card."""
    from shortstack.runtimes.packed.kernels import BITS_OF_FLOATS, WORD_CONFIGS, direct_kernel

    device = torch.device("cuda:0")
    made = matrix(41, columns)
    with torch.inference_mode():
        held = CardDirectMatrix(made, torch.bfloat16, device)
        x = torch.randn(2, columns, device=device).bfloat16()
        truth = x.double() @ torch.from_numpy(made.weights()).double().T.to(device)
        scale = x.double().abs() @ torch.from_numpy(made.weights()).double().abs().T.to(device)
        for config in WORD_CONFIGS:
            y = x.new_full((2, 41), float("nan"))
            direct_kernel.fn[(-(-41 // config.kwargs["ROWS"]), 2)](
                *(*held.arguments(x, y), *BITS_OF_FLOATS),
                **held.constants,
                **config.all_kwargs(),
            )
            assert ((y - truth).abs() <= truth.abs() * 2**-7 + scale * 1e-5).all(), config
            assert (y[:, 3] == 0).all(), config


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    return pack(write_coded(tiny, folder / "folder"), folder / "model.packed.safetensors").path


def forced(
    path: Path, device: str, tokens: list[int], **options: str
) -> tuple[np.ndarray, list[int]]:
    """Logits behind the prompt and each of `tokens` (or of N greedy ones), and those tokens."""
    with open_session(
        path, "pytorch-packed", threads=1, context_tokens=64, device=device, options=options
    ) as session:
        rows = [session.prefill(PROMPT)]
        chosen = list(tokens)
        for step in range(N):
            if len(chosen) <= step:
                chosen.append(int(rows[-1].argmax()))
            rows.append(session.decode(chosen[step]))
    return np.array(rows), chosen


@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("form", ["direct", "int8", "plain"])
def test_a_session_on_a_card_computes_what_the_cpu_does(
    packed: Path, form: str, graph: str
) -> None:
    truth, tokens = forced(packed, "cpu", [], dtype="float32")
    exact, chosen = forced(packed, "cuda:0", [], dtype="float32", form=form, cuda_graph=graph)
    assert chosen == tokens
    np.testing.assert_allclose(exact, truth, atol=1e-3)
    usual, _ = forced(packed, "cpu", tokens, form="plain")
    found, _ = forced(packed, "cuda:0", tokens, form=form, cuda_graph=graph)
    assert np.abs(found - truth).mean() < 2 * np.abs(usual - truth).mean()
