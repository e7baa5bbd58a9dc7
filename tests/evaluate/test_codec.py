"""Prompts and choices become the tokens that lm-evaluation-harness would score."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from shortstack.errors import ShortstackError
from shortstack.evaluate.codec import FolderCodec, encode_pair, with_prefix

BOS = "<|im_start|>"


@pytest.fixture
def begins(tiny: Path, tmp_path: Path) -> Path:
    """The tiny tokenizer, adding the beginning of text by itself, and saved while it cut."""
    folder = tmp_path / "begins"
    folder.mkdir()
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(tiny / name, folder)
    made = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    made.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    made.enable_truncation(4)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("adds_start", [False, True])
def test_a_pair_is_encoded_whole_and_split_where_the_prompt_ends(
    adds_start: bool, tiny: Path, begins: Path
) -> None:
    folder = begins if adds_start else tiny
    codec, theirs = FolderCodec(folder), AutoTokenizer.from_pretrained(folder)
    assert codec.prefix == ([codec.start] if adds_start else [])
    for context, continuation in [("Permission is hereby", " granted"), ("A", "b"), ("½", " 🙂!")]:
        head, tail = encode_pair(codec, context, continuation)
        assert head == theirs(context).input_ids
        assert head + tail == theirs(context + continuation).input_ids


def test_white_space_that_ends_a_prompt_moves_to_the_choice(tiny: Path) -> None:
    codec = FolderCodec(tiny)
    assert encode_pair(codec, "Permission is ", "granted") == encode_pair(
        codec, "Permission is", " granted"
    )


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_prompt_becomes_the_beginning_of_text(context: str, tiny: Path) -> None:
    codec = FolderCodec(tiny)
    head, tail = encode_pair(codec, context, "granted")
    assert head == [codec.start]
    assert tail == codec.encode(context + "granted")
    # a text that spells it out gets no second one
    assert encode_pair(codec, "", f"{BOS}granted") == ([codec.start], codec.encode("granted"))


def test_a_beginning_that_is_spelled_out_is_not_doubled(begins: Path) -> None:
    codec = FolderCodec(begins)
    assert with_prefix(codec, f"{BOS}granted") == with_prefix(codec, "granted")


def test_a_choice_without_tokens_and_a_folder_without_tokenizer_are_refused(
    tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match="no token of its own"):
        encode_pair(FolderCodec(tiny), "granted", "")
    with pytest.raises(ShortstackError, match="--tokenizer"):
        FolderCodec(tmp_path)
