"""A tokenizer folder as the key-values that llama.cpp reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.pretokenizers import (
    GPT4O_SPLIT,
    LLAMA3_SPLIT,
    PRE_TOKENIZERS,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    TokenType,
)

SPACE = "▁"
"""How SentencePiece writes a space (U+2581)."""


RULE_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("bytes+regex",): ("gpt-2",),
    ("digits", "bytes+regex"): ("smollm",),
    (f"split {LLAMA3_SPLIT}", "bytes"): ("llama-bpe", "dbrx"),
    (f"split {QWEN2_SPLIT}", "bytes"): ("qwen2",),
    (f"split {GPT4O_SPLIT}", "bytes"): ("gpt-4o",),
    (f"split {TEKKEN_SPLIT}", "bytes"): ("tekken",),
}
"""How text is cut before the merges, as tokenizer.json says it -> llama.cpp's names for the same,
which differ in WHOLE_WORDS_FIRST. OLMo 2 has the rule of dbrx, Granite 3 that of smollm, Phi-4-mini
that of gpt-4o."""

WHOLE_WORDS_FIRST = {n for n, rule in PRE_TOKENIZERS.items() if rule.whole_words_first}
"""Where llama.cpp looks a whole word up before it merges: tokenizer.json calls it ignore_merges."""

RULE_NOTES = {
    "gpt-4o": (
        "llama.cpp's gpt-4o rule knows capitals of A to Z only: text of scripts with others "
        "may be cut differently"
    ),
}

METASPACE_NOTE = (
    "llama.cpp puts a space before every text, tokenizer.json only before one that begins without: "
    "text with a leading space is cut differently"
)

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""tokenizer_config's names of special tokens -> GGUF's."""


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.*` keys hold. Scores for SentencePiece-like models, merges for the others."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    note: str | None = None


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read tokenizer.json and its config, padded to `vocab_size` tokens.

    Raises ShortstackError for a tokenizer that llama.cpp would read differently.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ShortstackError(
            f"{folder} has no tokenizer.json, which a GGUF file is made from. "
            "Save the tokenizer as a fast tokenizer into the folder."
        )
    data = json.loads(file.read_text(encoding="utf-8"))
    model = data["model"]
    if model.get("type") != "BPE":
        raise ShortstackError(
            f"{file}: tokenizer type {model.get('type')!r} has no GGUF form here. "
            "Known: BPE (byte-level or with byte fallback). Export to onnx instead."
        )
    config = _read_json(folder / "tokenizer_config.json")
    tokens, types = _tokens(file, data, vocab_size)
    sentencepiece = bool(model.get("byte_fallback"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = {token: index for index, token in enumerate(tokens)}
    special = _special_ids(folder, config, ids)
    if sentencepiece:
        types = _sentencepiece_types(tokens, types, special.get("unknown"))
    add_bos, add_eos = _adds(data, config, special)
    pre = "default" if sentencepiece else _pre_tokenizer(file, data)
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=() if sentencepiece else tuple(merges),
        scores=_scores(tokens, merges) if sentencepiece else (),
        special_ids=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=sentencepiece and _space_prefix(file, data),
        chat_template=_chat_template(folder, config),
        note=METASPACE_NOTE if sentencepiece and _has_metaspace(data) else RULE_NOTES.get(pre),
    )


def peak_bytes(folder: Path, vocab_size: int) -> int:
    """Memory of reading and writing a vocabulary: a token and its merges take about 1 kB as Python
    objects, but parsed JSON never more than 28 times its text."""
    file = folder / "tokenizer.json"
    taken = 1_100 * vocab_size
    if file.is_file():
        taken = min(taken, 28 * file.stat().st_size)
    return 5_000_000 + taken


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the `tokenizer.*` keys to a GGUFWriter."""
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.add_eos:
        writer.add_add_eos_token(True)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, index in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _tokens(
    file: Path, data: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    """Every id's text and type; ids that no token has become unused padding."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    named = [(index, text, TokenType.NORMAL) for text, index in data["model"]["vocab"].items()]
    for added in data.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        named.append((added["id"], added["content"], kind))
    for index, text, kind in named:
        if index >= vocab_size:
            raise ShortstackError(
                f"{file}: token {text!r} has id {index}, but config.json says vocab_size is "
                f"{vocab_size}. Resize the embedding or take the tokenizer that belongs to it."
            )
        tokens[index], types[index] = text, kind
    return tokens, types


def _special_ids(folder: Path, config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    fallback = _read_json(folder / "special_tokens_map.json")
    found: dict[str, int] = {}
    for name, gguf_name in SPECIAL.items():
        token = config.get(f"{name}_token") or fallback.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[gguf_name] = ids[text]
    return found


def _sentencepiece_types(
    tokens: Sequence[str], types: Sequence[TokenType], unknown: int | None
) -> list[TokenType]:
    def kind(index: int, token: str, given: TokenType) -> TokenType:
        if index == unknown:
            return TokenType.UNKNOWN
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return TokenType.BYTE if is_byte else given

    return [kind(i, *pair) for i, pair in enumerate(zip(tokens, types, strict=True))]


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> tuple[float, ...]:
    """Scores that make llama.cpp merge in the order of `merges`.

    It joins the neighbours whose union has the highest score; so the first union a merge names
    gets 0, the next -1, and what no merge makes comes last.
    """
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault(merge.replace(" ", ""), len(rank))
    return tuple(float(-rank.get(token, len(rank))) for token in tokens)


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A pre-tokenizer, normalizer or post-processor as a flat list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for sub in part[inner] for step in _steps(sub, inner)]
    return [part]


def _pre_tokenizer(file: Path, data: Mapping[str, Any]) -> str:
    steps = tuple(_signature(step) for step in _steps(data["pre_tokenizer"], "pretokenizers"))
    names = RULE_NAMES.get(steps)
    if names is None:
        known = (name for pair in RULE_NAMES.values() for name in pair)
        raise ShortstackError(
            f"{file}: the pre-tokenizer {' then '.join(steps) or 'none'} is none that llama.cpp "
            f"is known to have. Known: {', '.join(known)}. "
            "Export to onnx instead."
        )
    whole = bool(data["model"].get("ignore_merges"))
    pre = next((name for name in names if (name in WHOLE_WORDS_FIRST) == whole), None)
    if pre is None:
        raise ShortstackError(
            f"{file}: ignore_merges is {whole}, but llama.cpp's {names[0]!r} pre-tokenizer does "
            "the opposite. Export to onnx instead."
        )
    return pre


def _signature(step: Mapping[str, Any]) -> str:
    """One step in the words of RULE_NAMES; a word the table lacks for any other."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "bytes+regex" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern}:
            return f"split {pattern.get('Regex')}"
        case _:
            return str(step["type"])


def _space_prefix(file: Path, data: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    for step in _steps(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return bool(step["prepend"] == SPACE)
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
        if _cuts_at_spaces(step) and _replaces_spaces(data):  # Gemma's: there are none left
            continue
        raise ShortstackError(
            f"{file}: the pre-tokenizer {step['type']} before byte-fallback BPE is none that "
            "llama.cpp has. Export to onnx instead."
        )
    return False


def _cuts_at_spaces(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Split" and step.get("pattern") == {"String": " "}


def _replaces_spaces(data: Mapping[str, Any]) -> bool:
    return any(
        step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE)
        for step in _steps(data.get("normalizer"), "normalizers")
    )


def _has_metaspace(data: Mapping[str, Any]) -> bool:
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" for step in steps)


def _adds(
    data: Mapping[str, Any], config: Mapping[str, Any], special: Mapping[str, int]
) -> tuple[bool, bool]:
    """Whether encoding puts BOS before, EOS behind: the post-processor says so, or the config."""
    for step in _steps(data.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            at = [i for i, piece in enumerate(step["single"]) if "Sequence" in piece][0]
            return at > 0, at + 1 < len(step["single"])
    return (
        bool(config.get("add_bos_token")) and "bos" in special,
        bool(config.get("add_eos_token")) and "eos" in special,
    )


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
