"""tokenizer.json and its companions from the vocabulary inside a GGUF file.

GGUF names the pre-tokenizer instead of describing it, so a table holds those we know exactly.
Each was compared with llama.cpp on long and on nasty text (tests/intake).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.pretokenizers import PRE_TOKENIZERS, TokenType

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The checked `tokenizer.ggml.*` keys."""

    file: Path
    keys: Mapping[str, Any]
    tokens: list[str]
    types: Sequence[int]

    @classmethod
    def read(cls, file: Path, fields: Mapping[str, Any]) -> Vocabulary:
        prefix = "tokenizer.ggml."
        keys = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        tokens = keys.get("tokens")
        if not tokens:
            raise ShortstackError(f"{file} holds no tokenizer. Start from the original folder.")
        types = keys.get("token_type") or [TokenType.NORMAL] * len(tokens)
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise ShortstackError(
                f"{file}: the vocabulary has {len(tokens)} tokens, {len(set(tokens))} distinct, "
                f"{len(types)} types; these must agree. Download the file again."
            )
        return cls(file, keys, tokens, types)

    def special(self, role: str) -> str | None:
        """The token that plays `role` (`bos`, `eos`, `unknown`, `padding`), if any."""
        index = self.keys.get(f"{role}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise ShortstackError(
                f"{self.file}: {role} token {index} is outside the vocabulary. "
                "Download the file again."
            )
        token: str = self.tokens[index]
        return token


def write_tokenizer(
    file: Path, fields: Mapping[str, Any], config: Mapping[str, Any], out: Path
) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `out`.

    Raises ShortstackError for a tokenizer whose ids we cannot promise to be equal.
    """
    vocabulary = Vocabulary.read(file, fields)
    if len(vocabulary.tokens) > config["vocab_size"]:
        raise ShortstackError(
            f"{file}: {len(vocabulary.tokens)} tokens but {config['vocab_size']} embedding rows. "
            "Download the file again."
        )
    tokenizer = build_tokenizer(vocabulary)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(vocabulary, fields, config))
    _write_json(out / "generation_config.json", _generation_config(vocabulary))


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The `tokenizers` object that gives the ids llama.cpp gives."""
    kind = vocabulary.keys.get("model")
    try:
        build = MODELS[str(kind)]
    except KeyError:
        raise ShortstackError(
            f"{vocabulary.file}: tokenizer model {kind!r} is not supported from GGUF. "
            f"Supported: {', '.join(MODELS)}. Start from the original folder."
        ) from None
    try:
        tokenizer, add_bos = build(vocabulary)
    except ImportError:
        raise MissingExtraError("tokenizers", "gguf", "rebuilding a tokenizer") from None
    tokenizer.add_special_tokens(_added(vocabulary, special=True))
    tokenizer.add_tokens(_added(vocabulary, special=False))
    _frame(tokenizer, vocabulary, add_bos)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = vocabulary.keys.get("pre")
    known = PRE_TOKENIZERS.get(str(name))
    if known is None:
        raise ShortstackError(
            f"{vocabulary.file}: pre-tokenizer {name!r} is unknown. Known: "
            f"{', '.join(PRE_TOKENIZERS)}. Start from the original folder."
        )
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    pairs = (merge.split(" ") for merge in vocabulary.keys.get("merges") or ())
    merges = [(left, right) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=known.whole_words_first))
    steps: list[Any] = []
    if known.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if known.split:
        steps.append(pre_tokenizers.Split(Regex(known.split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not known.split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, known.add_bos


def _sentencepiece(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: the pair whose joined piece scores highest merges first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    scores = vocabulary.keys.get("scores") or []
    if missing or len(scores) != len(ids) or vocabulary.keys.get("precompiled_charsmap"):
        raise ShortstackError(
            f"{vocabulary.file}: its SentencePiece vocabulary lacks byte tokens or scores, or "
            "normalizes text. Start from the original folder."
        )
    unknown = vocabulary.special("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            merges_by_score(vocabulary.file, vocabulary.tokens, scores, vocabulary.types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space: list[Any] = [normalizers.Replace(" ", "▁")]
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.keys.get("add_space_prefix", True):
        space.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(space)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer, True


MODELS: dict[str, Callable[[Vocabulary], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
"""`tokenizer.ggml.model` -> builder; the flag says whether BOS is added unless a key says so."""


def merges_by_score(
    file: Path, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Turn piece scores into ranked merges: every split of a piece, best piece first.

    Raises ShortstackError for equal scores: llama.cpp then takes the leftmost pair of the text,
    which a ranking cannot say.
    """
    known = set(tokens)
    splits: dict[float, list[tuple[str, str]]] = {}
    for token, score, kind in zip(tokens, scores, types, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in known and pair[1] in known]
        if kind != TokenType.NORMAL or not found:
            continue
        if score in splits:
            raise ShortstackError(
                f"{file}: pieces {''.join(splits[score][0])!r} and {token!r} have one score, so "
                "the tokenizer cannot be rebuilt exactly. Start from the original folder."
            )
        splits[score] = found
    return [pair for score in sorted(splits, reverse=True) for pair in splits[score]]


def _added(vocabulary: Vocabulary, *, special: bool) -> list[AddedToken]:
    from tokenizers import AddedToken

    kinds = (TokenType.CONTROL, TokenType.UNKNOWN) if special else (TokenType.USER_DEFINED,)
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in kinds
    ]


def _frame(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
    """Add BOS and EOS around a text only where the file says that the model expects them."""
    from tokenizers import processors

    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    template, used = "$A", []
    if vocabulary.keys.get("add_bos_token", add_bos) and bos is not None:
        template, used = f"{bos} {template}", [bos]
    if vocabulary.keys.get("add_eos_token", False) and eos is not None:
        template, used = f"{template} {eos}", [*used, eos]
    if used:
        pairs = [(token, vocabulary.tokens.index(token)) for token in used]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} {template.replace('$A', '$B')}", special_tokens=pairs
        )


def _tokenizer_config(
    vocabulary: Vocabulary, fields: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    data: dict[str, Any] = {
        # transformers 4 and 5 both read this name and build nothing of their own on top.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.special(role)
        if token is not None:
            data[f"{name}_token"] = token
    template = fields.get("tokenizer.chat_template")
    if template:
        data["chat_template"] = template
    return data


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = ("bos", "eos", "padding")
    data = {
        f"{role.removesuffix('ding')}_token_id": vocabulary.keys[f"{role}_token_id"]
        for role in roles
        if vocabulary.special(role) is not None
    }
    turn_end = vocabulary.keys.get("eot_token_id")
    if turn_end is not None and turn_end != data.get("eos_token_id"):
        ends = [data["eos_token_id"]] if "eos_token_id" in data else []
        data["eos_token_id"] = [*ends, turn_end]
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
