"""A GGUF file cut directly computes what the same layers written anew compute."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tests import gguf_zoo
from tests.gguf_zoo import KINDS, write_file

from shortstack.errors import ShortstackError
from shortstack.gguf_archs import ARCHS, PATTERN_READ_SINCE
from shortstack.gguf_header import read_header
from shortstack.prune.gguf_cut import GgufCut, cut_gguf, plan_cut
from shortstack.runtimes import open_session

TOKENS = np.random.default_rng(3).integers(3, gguf_zoo.VOCAB, 48).tolist()
"""Three windows long."""

RUNNABLE = ("llama", "deci", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "cohere2")
DEPTHS = {"gemma3": 12}
DROPS: dict[str, tuple[int, ...]] = {
    "first": (0,),
    "last": (-1,),
    "scattered": (1, 4, 6),
    "whole period": (4, 5, 6, 7),
}


def logits(file: Path) -> NDArray[np.float32]:
    with open_session(file, "llama.cpp", threads=1, context_tokens=len(TOKENS)) as session:
        return session.prefill(TOKENS, all_logits=True)


def cut(source: Path, drop: Sequence[int], target: Path) -> GgufCut:
    made = plan_cut(source, tuple(drop))
    cut_gguf(made, target)
    return made


def flags(arch: str, layers: Sequence[int]) -> list[bool] | None:
    """One a layer, by its original number; written even where the default says the same."""
    period = KINDS[arch].window_period
    return None if period is None else [layer % period != period - 1 for layer in layers]


@pytest.mark.parametrize("where", DROPS)
@pytest.mark.parametrize("arch", RUNNABLE)
def test_a_cut_file_computes_what_its_layers_written_anew_compute(
    arch: str, where: str, tmp_path: Path
) -> None:
    depth = DEPTHS.get(arch, 8)
    drop = tuple(sorted(layer % depth for layer in DROPS[where]))
    keep = [layer for layer in range(depth) if layer not in drop]
    source = write_file(tmp_path / "whole.gguf", arch, range(depth))
    right = write_file(tmp_path / "right.gguf", arch, keep, pattern=flags(arch, keep))
    made = cut(source, drop, tmp_path / "cut.gguf")
    assert (logits(tmp_path / "cut.gguf") == logits(right)).all()
    needs_pattern = flags(arch, keep) != flags(arch, range(len(keep)))
    assert (made.edits.least_runtime == PATTERN_READ_SINCE) == needs_pattern
    pattern = read_header(tmp_path / "cut.gguf").value(f"{arch}.attention.sliding_window_pattern")
    assert pattern == (flags(arch, keep) if needs_pattern else None)


def test_quantized_bytes_and_other_keys_stay_as_they_are(tmp_path: Path) -> None:
    source = write_file(tmp_path / "whole.gguf", "llama", range(6), kind="Q4_0")
    made = cut(source, (1, 4), tmp_path / "cut.gguf")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "cut.gguf")
    old = {tensor.name: tensor for tensor in before.tensors}
    places = {"0": "0", "1": "2", "2": "3", "3": "5"}
    assert len(after.tensors) == len(before.tensors) - 2 * 9
    for tensor in after.tensors:
        parts = tensor.name.split(".")
        name = ".".join(["blk", places[parts[1]], *parts[2:]]) if len(parts) > 2 else tensor.name
        assert tensor.tensor_type == old[name].tensor_type
        assert (tensor.data == old[name].data).all()
    fields = [
        {n: f.contents() for n, f in r.fields.items() if "GGUF" not in n} for r in (before, after)
    ]
    assert {n for n in fields[0] if fields[0][n] != fields[1][n]} == {"llama.block_count"}
    assert list(fields[0]) == list(fields[1])
    assert made.edits.changed == ("llama.block_count",)


def test_the_result_says_its_size_and_hash(tmp_path: Path) -> None:
    made = plan_cut(write_file(tmp_path / "whole.gguf", "qwen3", range(4)), (2,))
    seen: list[tuple[int, int]] = []
    sha256 = cut_gguf(made, tmp_path / "cut.gguf", lambda *now: seen.append(now))
    content = (tmp_path / "cut.gguf").read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256
    assert seen[-1] == (len(content), len(content)) == (made.n_bytes, made.n_bytes)
    assert sorted(seen) == seen


def test_arrays_of_a_deci_file_are_shortened(tmp_path: Path) -> None:
    source = write_file(tmp_path / "whole.gguf", "deci", range(8), without_attention=(3, 6))
    right = write_file(tmp_path / "right.gguf", "deci", [0, 1, 3, 4, 6], without_attention=(3, 6))
    cut(source, (2, 5, 7), tmp_path / "cut.gguf")
    assert (logits(tmp_path / "cut.gguf") == logits(right)).all()
    header = read_header(tmp_path / "cut.gguf")
    assert header.value("deci.attention.head_count") == [4, 4, 0, 4, 0]


def test_a_deci_file_cannot_begin_with_a_layer_without_attention(tmp_path: Path) -> None:
    source = write_file(tmp_path / "whole.gguf", "deci", range(4), without_attention=(1,))
    with pytest.raises(ShortstackError, match=r"layer 1 would come first.*head_count = 0"):
        plan_cut(source, (0,))


@pytest.mark.parametrize("drop", [(4, 5, 6, 7), (0, 1, 2, 3, 11), (10, 11)])
def test_a_rhythm_without_a_key_can_be_cut_in_step(drop: tuple[int, ...], tmp_path: Path) -> None:
    keep = [layer for layer in range(12) if layer not in drop]
    source = write_file(tmp_path / "whole.gguf", "smollm3", range(12))
    silent = write_file(tmp_path / "right.gguf", "smollm3", range(12), silent=drop)
    cut(source, drop, tmp_path / "cut.gguf")
    assert len(keep) == read_header(tmp_path / "cut.gguf").integer("smollm3.block_count")
    assert np.abs(logits(tmp_path / "cut.gguf") - logits(silent)).max() < 1e-5


def test_a_cut_out_of_step_is_refused_with_the_nearest_safe_ones(tmp_path: Path) -> None:
    source = write_file(tmp_path / "whole.gguf", "smollm3", range(12))
    words = r"without 5,.*every 4th layer.*Nearest safe cuts: --drop 11 or --drop \S+ or --drop 4-7"
    with pytest.raises(ShortstackError, match=words):
        plan_cut(source, (5,))


def test_an_attention_scale_chosen_by_depth_is_kept_by_scaling_the_query_norm(
    tmp_path: Path,
) -> None:
    """Gemma 3 of 62 layers: 60 layers would be scaled by 64 ** -0.5 instead of 16 ** -0.5."""
    drop = (7, 20)
    source = write_file(tmp_path / "whole.gguf", "gemma3", range(62))
    silent = write_file(tmp_path / "right.gguf", "gemma3", range(62), silent=drop)
    made = cut(source, drop, tmp_path / "cut.gguf")
    assert made.edits.notes == ("attn_q_norm.weight times 2.000000, for 60 layers",)
    assert (logits(tmp_path / "cut.gguf") == logits(silent)).all()


def test_an_attention_scale_that_nothing_can_take_up_is_refused(tmp_path: Path) -> None:
    keys = {"gemma2.attention.key_length": 8, "gemma2.attention.value_length": 8}
    source = write_file(tmp_path / "whole.gguf", "gemma2", range(46), keys=keys)
    with pytest.raises(ShortstackError, match="at 45 layers instead of 46.*the attention scale"):
        plan_cut(source, (7,))


@pytest.mark.parametrize(
    ("arch", "key", "period"), [("gemma3", 3, 3), ("olmo2", 2, 2), ("cohere2", 4, 4)]
)
def test_a_period_in_the_file_counts_more_than_the_default(
    arch: str, key: int, period: int, tmp_path: Path
) -> None:
    keep = [0, 2, 3, 5, 6, 7]
    given = {f"{arch}.attention.sliding_window_pattern": key}
    source = write_file(tmp_path / "whole.gguf", arch, range(8), keys=given)
    wanted = [layer % period != period - 1 for layer in keep]
    right = write_file(tmp_path / "right.gguf", arch, keep, pattern=wanted)
    cut(source, (1, 4), tmp_path / "cut.gguf")
    assert (logits(tmp_path / "cut.gguf") == logits(right)).all()


def test_a_pattern_in_the_file_is_shortened(tmp_path: Path) -> None:
    pattern = [True, False, False, True, True, False, True, True]
    source = write_file(tmp_path / "whole.gguf", "gemma2", range(8), pattern=pattern)
    made = cut(source, (1, 6), tmp_path / "cut.gguf")
    header = read_header(tmp_path / "cut.gguf")
    kept = [True, False, True, True, False, True]
    assert header.value("gemma2.attention.sliding_window_pattern") == kept
    assert made.edits.least_runtime == PATTERN_READ_SINCE


def test_no_pattern_is_written_where_the_window_is_off(tmp_path: Path) -> None:
    off = {"olmo2.attention.sliding_window": None}
    source = write_file(tmp_path / "whole.gguf", "olmo2", range(8), keys=off)
    made = cut(source, (1,), tmp_path / "cut.gguf")
    assert made.edits.changed == ("olmo2.block_count",)
    assert made.edits.least_runtime is None


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("llama", {"llama.expert_count": 8}, "has a mixture of experts"),
    "prediction": ("glm4", {"glm4.nextn_predict_layers": 1}, "multi-token prediction"),
    "lead": ("llama", {"llama.leading_dense_block_count": 1}, "leading dense layers"),
    "split": ("llama", {"split.count": 3}, "one of 3 split files"),
    "array": (
        "llama",
        {"llama.attention.novel": [1, 2]},
        "nothing is known of the array llama.att",
    ),
    "foreign": ("llama", {"novel.things": [1] * 6}, "nothing is known of the array novel.things"),
    "short array": ("llama", {"llama.feed_forward_length": [96] * 5}, "has 5 items, the file 6"),
    "scale": ("minicpm", {}, "has no minicpm.residual_scale"),
    "unknown": ("mamba", {}, "cannot be cut: unknown GGUF architecture 'mamba'.*Known:"),
    "depth": ("llama", {"llama.block_count": 2**31}, "llama.cpp reads 1 to 512"),
    "no depth": ("llama", {"llama.block_count": 0}, "llama.cpp reads 1 to 512"),
    "beyond": ("llama", {"llama.block_count": 5}, r"tensor blk.5.\S+ lies beyond the 5 layers"),
    "words": ("llama", {"llama.block_count": "six"}, "block_count is no whole number"),
    "tokens": ("llama", {"tokenizer.ggml.tokens": ["a"]}, "1 tokens, its embedding 128 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_exactly_is_refused_by_name(name: str, tmp_path: Path) -> None:
    arch, keys, words = REFUSED[name]
    source = write_file(tmp_path / "whole.gguf", arch, range(6), keys=keys)
    with pytest.raises(ShortstackError, match=words) as error:
        plan_cut(source, (1,))
    assert str(source) in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    source = write_file(tmp_path / "whole.gguf", "llama", range(4))
    for drop, words in (((4,), "no layer 4"), ((), "no layer to drop"), ((0, 1, 2, 3), "all 4")):
        with pytest.raises(ShortstackError, match=words):
            plan_cut(source, drop)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    made = plan_cut(write_file(tmp_path / "whole.gguf", "llama", range(4)), (1,))
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    with pytest.raises(ShortstackError, match="exists: it is not overwritten"):
        cut_gguf(made, taken)
    assert taken.read_text() == "mine"

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_gguf(made, tmp_path / "cut.gguf", interrupt)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ShortstackError, match="disk full"):
            cut_gguf(made, tmp_path / "cut.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.gguf", "whole.gguf"]


def test_every_architecture_of_the_table_is_one_of_gguf() -> None:
    assert set(ARCHS) <= set(gguf.MODEL_ARCH_NAMES.values())
