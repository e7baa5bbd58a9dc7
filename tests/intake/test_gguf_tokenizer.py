from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import Llama
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from shortstack.errors import ShortstackError
from shortstack.intake.gguf_tokenizer import Vocabulary, build_tokenizer, write_tokenizer
from shortstack.pretokenizers import PRE_TOKENIZERS, TokenType

from .conftest import NASTY, SPECIALS

PREFIX = "tokenizer.ggml."


def differences(path: Path, fields: dict[str, Any], texts: list[str]) -> Iterator[str]:
    """Texts whose ids differ from llama.cpp's reading of the same file."""
    ours = build_tokenizer(Vocabulary.read(path, fields))
    theirs = Llama(str(path), vocab_only=True, verbose=False)
    for specials in (True, False):
        ours.encode_special_tokens = not specials
        for text in texts:
            ids = theirs.tokenize(text.encode(), add_bos=False, special=specials)
            if ours.encode(text, add_special_tokens=False).ids != ids:
                yield f"{text[:60]!r}, specials read: {specials}"
    ours.encode_special_tokens = False
    for text in NASTY:
        if ours.encode(text).ids != theirs.tokenize(text.encode(), add_bos=True, special=True):
            yield f"{text[:60]!r}, framed by BOS and EOS"
    theirs.close()


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_ids_of_every_known_pre_tokenizer_are_llama_cpps(
    name: str, smollm2_fields: dict[str, Any], write_gguf: Callable[..., Path], licences: str
) -> None:
    fields = {**smollm2_fields, f"{PREFIX}pre": name}
    if name != "smollm":
        del fields[f"{PREFIX}add_bos_token"]  # so that the default of the name shows
    path = write_gguf(fields)
    assert not list(differences(path, fields, [*NASTY, *SPECIALS, licences]))


def test_smollm2_from_its_own_file_is_exact(
    smollm2: Path, smollm2_fields: dict[str, Any], licences: str
) -> None:
    assert not list(differences(smollm2, smollm2_fields, [*NASTY, *SPECIALS, licences]))


@pytest.fixture(scope="module")
def sentencepiece(licences: str) -> dict[str, Any]:
    """A SentencePiece-like vocabulary as GGUF holds it: pieces, scores, byte tokens."""
    learned = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learned.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    learned.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=first, show_progress=False, limit_alphabet=120
    )
    runs = [f"{' ' * 12}a{'b' * 9}\n"] * 500
    learned.train_from_iterator([*licences.splitlines(keepends=True), *runs], trainer)
    ids = learned.get_vocab()
    ranked = sorted(ids, key=ids.__getitem__)[len(first) :]
    pieces = [p for p in ranked if len(p) > 1] + [p for p in ranked if len(p) == 1]
    return {
        "general.architecture": "llama",
        f"{PREFIX}model": "llama",
        f"{PREFIX}tokens": [*first, *pieces, "<tool>"],
        f"{PREFIX}scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + 1)],
        f"{PREFIX}token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        f"{PREFIX}bos_token_id": 1,
        f"{PREFIX}eos_token_id": 2,
        f"{PREFIX}unknown_token_id": 0,
    }


@pytest.mark.parametrize(
    "keys",
    [{}, {"add_space_prefix": False, "add_bos_token": False}, {"add_eos_token": True}],
    ids=["default", "bare", "with-eos"],
)
def test_ids_of_a_sentencepiece_vocabulary_are_llama_cpps(
    keys: dict[str, Any],
    sentencepiece: dict[str, Any],
    write_gguf: Callable[..., Path],
    licences: str,
) -> None:
    fields = {**sentencepiece, **{PREFIX + key: value for key, value in keys.items()}}
    own = ["<s>hello</s> world<s>", "a <tool> b<tool>c", "<tool>", " </s> z"]
    assert not list(differences(write_gguf(fields), fields, [*NASTY, *SPECIALS, *own, licences]))


def test_sentencepiece_text_comes_back(sentencepiece: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(Vocabulary.read(Path("x"), sentencepiece))
    for text in ("Hello  world", "naïve 日本\n\tx", "a"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_reads_the_written_files(
    smollm2: Path, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    config = {"vocab_size": 49152, "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_tokenizer(smollm2, smollm2_fields, config, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer("Hello 123").input_ids == [19556, 216, 33, 34, 35]  # digits apart, no BOS
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == smollm2_fields["tokenizer.chat_template"]
    assert tokenizer.decode(tokenizer("a , b . don 't").input_ids) == "a , b . don 't"
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not (tmp_path / "tokenizer.model").exists()
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_an_end_of_turn_token_ends_generation_too(
    smollm2: Path, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    fields = {**smollm2_fields, f"{PREFIX}eot_token_id": 0}
    write_tokenizer(smollm2, fields, {"vocab_size": 49152, "max_position_embeddings": 8}, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2' is unknown"),
        ({"pre": "default"}, "pre-tokenizer 'default' is unknown"),
        ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"tokens": []}, "holds no tokenizer"),
        ({"token_type": [1, 1]}, "these must agree"),
        ({"eos_token_id": 99999}, "eos token 99999 is outside the vocabulary"),
    ],
)
def test_a_tokenizer_that_would_be_guessed_is_refused(
    changes: dict[str, Any], words: str, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    fields = {**smollm2_fields, **{PREFIX + key: value for key, value in changes.items()}}
    with pytest.raises(ShortstackError, match=words):
        write_tokenizer(
            Path("x.gguf"), fields, {"vocab_size": 49152, "max_position_embeddings": 8}, tmp_path
        )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("scores", [], "lacks byte tokens or scores"),
        ("scores", "equal", "have one score"),
        ("precompiled_charsmap", [1], "normalizes text"),
    ],
)
def test_a_sentencepiece_vocabulary_that_would_differ_is_refused(
    key: str, value: Any, words: str, sentencepiece: dict[str, Any]
) -> None:
    if value == "equal":
        value = [0.0] * len(sentencepiece[f"{PREFIX}tokens"])
    with pytest.raises(ShortstackError, match=words):
        build_tokenizer(Vocabulary.read(Path("x"), {**sentencepiece, PREFIX + key: value}))


def test_token_types_are_those_of_the_gguf_package() -> None:
    import gguf

    assert {kind.name: kind.value for kind in TokenType} == {
        kind.name: kind.value for kind in gguf.TokenType
    }
