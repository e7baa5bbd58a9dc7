"""A packed file computes what its unpacked folder does, whatever form its matrices are held in:
bit for bit in float32, and in bfloat16 as near as the unpacked model in bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.packed_models import pack, write_coded

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.packed.file import PackedFile
from shortstack.packed.plan_file import CurvePoint, PlanFile
from shortstack.packed.resident import Resident
from shortstack.runtimes import open_session
from shortstack.runtimes.pytorch_packed import PackedSession
from shortstack.session import Session

PROMPT = [1, 50, 60, 70, 300, 20, 19]
N = 24
LONG = [(7 * i + 3) % 500 for i in range(40)]
"""Beyond what the kernels of decoding take at once."""
FORMS = ("auto", "direct", "lean", "int8", "stream", "plain")


@pytest.fixture(scope="module")
def coded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_coded(tiny, tmp_path_factory.mktemp("coded") / "folder")


@pytest.fixture(scope="module")
def packed(coded: Checkpoint) -> Path:
    return pack(coded, coded.path.parent / "model.packed.safetensors").path


@pytest.fixture(scope="module")
def lossless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 weights without row codes."""
    target = tmp_path_factory.mktemp("lossless") / "model.packed.safetensors"
    return pack(Checkpoint.open(tiny), target).path


def open_packed(path: Path, **options: str) -> PackedSession:
    made = open_session(path, "pytorch-packed", threads=1, context_tokens=64, options=options)
    assert isinstance(made, PackedSession)
    return made


def open_folder(path: Path, dtype: str = "float32") -> Session:
    return open_session(path, "pytorch", threads=1, context_tokens=64, options={"dtype": dtype})


def forced(session: Session, tokens: list[int]) -> np.ndarray:
    """Logits of a prompt, then behind each of `tokens`."""
    return np.concatenate(
        [session.prefill(PROMPT, all_logits=True), [session.decode(token) for token in tokens]]
    )


def greedy(session: Session) -> list[int]:
    chosen = [int(session.prefill(PROMPT).argmax())]
    while len(chosen) < N:
        chosen.append(int(session.decode(chosen[-1]).argmax()))
    return chosen


@pytest.mark.parametrize("form", FORMS)
def test_in_float32_it_is_the_unpacked_model_bit_for_bit(
    packed: Path, coded: Checkpoint, form: str
) -> None:
    with open_folder(coded.path) as plain, open_packed(packed, dtype="float32", form=form) as ours:
        tokens = greedy(plain)
        assert greedy(ours) == tokens
        np.testing.assert_array_equal(forced(ours, tokens), forced(plain, tokens))
        np.testing.assert_array_equal(ours.prefill(LONG), plain.prefill(LONG))
        assert ours.tokenize("some words") == plain.tokenize("some words")


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_decoding_ahead_changes_nothing(packed: Path, coded: Checkpoint, workers: str) -> None:
    with (
        open_folder(coded.path) as plain,
        open_packed(packed, dtype="float32", form="stream", workers=workers) as ours,
    ):
        tokens = greedy(plain)
        np.testing.assert_array_equal(forced(ours, tokens), forced(plain, tokens))


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16_it_errs_no_more_than_the_unpacked_model(
    packed: Path, coded: Checkpoint, form: str
) -> None:
    with open_folder(coded.path) as plain:
        tokens = greedy(plain)
        truth, long = forced(plain, tokens), plain.prefill(LONG)
    with open_folder(coded.path, "bfloat16") as plain:
        usual = float(np.abs(forced(plain, tokens) - truth).mean())
    with open_packed(packed, form=form) as ours:
        assert ours.info["dtype"] == "bfloat16"
        assert float(np.abs(forced(ours, tokens) - truth).mean()) < 1.5 * usual
        assert float(np.abs(ours.prefill(LONG) - long).mean()) < 3 * usual


@pytest.mark.parametrize("form", ["auto", "stream", "plain"])
def test_a_file_without_codes_runs_too(lossless: Path, tiny: Path, form: str) -> None:
    with open_folder(tiny) as plain, open_packed(lossless, dtype="float32", form=form) as ours:
        tokens = greedy(plain)
        np.testing.assert_array_equal(forced(ours, tokens), forced(plain, tokens))
        assert ours.info["forms"] == {"stream" if form == "stream" else "plain": 43}


@pytest.mark.parametrize("form", ["direct", "int8"])
def test_a_file_without_codes_has_no_form_of_codes(lossless: Path, form: str) -> None:
    with pytest.raises(ShortstackError, match="has no row codes.*Take form=stream"):
        open_packed(lossless, form=form)


def test_the_head_can_have_a_form_of_its_own(packed: Path) -> None:
    with open_packed(packed, form="stream", head="int8") as ours:
        assert ours.info["forms"] == {"stream": 42, "int8": 1}


def test_coded_matrices_take_less_than_their_codes(packed: Path) -> None:
    with (
        open_packed(packed, form="stream", workers="0") as stream,
        open_packed(packed, form="int8") as int8,
    ):
        coded = stream.info["weight_bytes"] - stream.info["buffer_bytes"]
        assert coded < 0.6 * int8.info["weight_bytes"]


def test_an_unknown_form_is_refused(packed: Path) -> None:
    with pytest.raises(ShortstackError, match="form is 'int3', it must be one of: auto, direct"):
        open_packed(packed, form="int3")


def test_a_damaged_file_is_refused(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    entries = PackedFile(packed).contents.entries
    begin = len(data) - sum(entry.coded_bytes for entry in entries)
    for entry in entries:
        if entry.is_tensor:
            data[begin] ^= 1
            break
        begin += entry.coded_bytes
    broken = tmp_path / "broken.packed.safetensors"
    broken.write_bytes(data)
    with pytest.raises(ShortstackError, match="have changed"):
        open_packed(broken)


def test_a_plan_of_forms_that_matrices_cannot_have_is_to_blame(
    lossless: Path, tmp_path: Path
) -> None:
    """Not the file, which is sound: its matrices have no row codes."""
    with open_packed(lossless) as session:
        forms = dict.fromkeys(session.packed.forms, "direct")
    point = CurvePoint(n_bytes=1, predicted_s=1.0, share_of_int8=1.0, slowdown=1.0, forms={})
    plan = PlanFile(
        model_sha256=Resident(lossless).sha256,
        device="cpu",
        threads=1,
        workers=0,
        dtype="bfloat16",
        int8_bytes=1,
        int8_s=1.0,
        chosen=point,
        curve=[point],
        forms=forms,
    )
    file = tmp_path / "plan.json"
    file.write_text(plan.model_dump_json())
    with pytest.raises(ShortstackError, match="the plan holds .* as direct, .*no row codes"):
        open_packed(lossless, plan=str(file))
