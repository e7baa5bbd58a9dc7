"""Which type libllama's quantizer gives each tensor of a file type: its mixes, as tables.

Source: src/llama-quant.cpp (llama_tensor_get_type_impl) of the llama.cpp that llama-cpp-python
0.3.36 holds, for dense models. Exact, so that sizes are known and a missing importance matrix is
told before anything is written; the tests hold every line against libllama.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shortstack.export.gguf_types import NEED_IMPORTANCE, PRECISIONS, TYPES, fallback

KINDS: tuple[tuple[str, str], ...] = (
    (r"^output\.weight$", "head"),
    (r"^token_embd\.weight$", "embedding"),
    (r"attn_(qkv|v)\.weight$", "v"),
    (r"attn_k\.weight$", "k"),
    (r"attn_q\.weight$", "q"),
    (r"attn_output\.weight$", "o"),
    (r"ffn_down\.weight$", "down"),
    (r"ffn_gate\.weight$", "gate"),
    (r"ffn_up\.weight$", "up"),
)
"""Name of a tensor in GGUF -> what the mixes call it."""


@dataclass(frozen=True)
class Place:
    """What a rule may ask: the tensor's number among its kind and the count of that kind, query
    heads a key head, whether there is an importance matrix."""

    index: int
    count: int
    groups: int
    importance: bool

    @property
    def first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def more_bits(self) -> bool:
        """The first and the last eighth, and of the layers between them every third."""
        eighth = self.count // 8
        late = self.index >= 7 * self.count // 8
        return self.index < eighth or late or (self.index - eighth) % 3 == 2

    @property
    def grouped(self) -> bool:
        return self.groups >= 4


Rule = tuple[str, Callable[[Place], bool]]
"""A type and when it is taken; the first rule that holds counts, else the file's body type."""


def _always(place: Place) -> bool:
    return True


def _grouped(place: Place) -> bool:
    return place.grouped


def _more_bits(place: Place) -> bool:
    return place.more_bits


def _first_eighth(place: Place) -> bool:
    return place.first_eighth


def _blind_first_eighth(place: Place) -> bool:
    return place.first_eighth and not place.importance


def _guarded_first_eighth(place: Place) -> bool:
    return place.first_eighth and place.importance


def _middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


_TINY: dict[str, tuple[Rule, ...]] = {
    "head": (("Q5_K", _always),),
    "embedding": (("Q2_K", _always),),
    "v": (("Q4_K", _grouped), ("Q2_K", _always)),
    "down": (("Q2_K", _first_eighth),),
}
_SMALL: dict[str, tuple[Rule, ...]] = {
    "head": (("Q5_K", _always),),
    "embedding": (("IQ3_S", _always),),
    "v": (("Q4_K", _grouped), ("IQ3_S", _always)),
    "down": (("IQ3_S", _first_eighth),),
    "o": (("IQ3_S", _always),),
}
_IQ4: dict[str, tuple[Rule, ...]] = {
    "v": (("Q5_K", _grouped),),
    "down": (("Q5_K", _blind_first_eighth),),
}

MIXES: dict[str, Mapping[str, tuple[Rule, ...]]] = {
    "Q8_0": {"head": (("Q8_0", _always),)},
    "Q5_K_M": {"v": (("Q6_K", _more_bits),), "down": (("Q6_K", _more_bits),)},
    "Q5_0": {"down": (("Q5_1", _guarded_first_eighth),)},
    "Q4_K_M": {"v": (("Q6_K", _more_bits),), "down": (("Q6_K", _more_bits),)},
    "Q4_K_S": {"v": (("Q5_K", lambda p: p.index < 4),), "down": (("Q5_K", _first_eighth),)},
    "Q4_0": {"down": (("Q4_1", _guarded_first_eighth),)},
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "Q3_K_L": {kind: (("Q5_K", _always),) for kind in ("v", "down", "o")},
    "Q3_K_M": {
        "v": (("Q5_K", lambda p: p.index < 2), ("Q4_K", _always)),
        "down": (("Q5_K", lambda p: p.index < p.count // 16), ("Q4_K", _always)),
        "o": (("Q4_K", _always),),
    },
    "IQ3_M": {
        "v": (("Q4_K", _always),),
        "down": (("Q4_K", _first_eighth),),
        "o": (("Q4_K", _always),),
    },
    "IQ3_S": {"v": (("Q4_K", _grouped),)},
    "IQ3_XS": {
        "v": (("Q4_K", _grouped),),
        "q": (("IQ3_XXS", _always),),
        "k": (("IQ3_XXS", _always),),
        "gate": (("IQ3_XXS", _middle),),
        "up": (("IQ3_XXS", _middle),),
    },
    "IQ3_XXS": {
        "head": (("Q5_K", _always),),
        "embedding": (("IQ3_S", _always),),
        "v": (("Q4_K", _grouped), ("IQ3_S", lambda p: not p.importance)),
        "q": (("IQ2_S", _always),),
        "k": (("IQ2_S", _always),),
        "down": (("Q4_K", _blind_first_eighth), ("Q3_K", lambda p: not p.importance)),
        "o": (("IQ3_S", _always),),
    },
    "Q2_K": {
        "v": (("Q4_K", _grouped), ("Q3_K", _always)),
        "down": (("Q3_K", _always),),
        "o": (("Q3_K", _always),),
    },
    "Q2_K_S": {"v": (("Q4_K", _grouped),), "down": (("Q4_K", _first_eighth),)},
    "IQ2_M": _SMALL,
    "IQ2_S": _SMALL,
    "IQ2_XS": _TINY,
    "IQ2_XXS": _TINY,
    "TQ2_0": {"embedding": (("Q4_K", _always),)},
    "TQ1_0": {"embedding": (("Q4_K", _always),)},
    "IQ1_M": {**_TINY, "o": (("IQ2_XXS", _always),)},
    "IQ1_S": {**_TINY, "o": (("IQ2_XXS", _always),)},
}
"""File type -> kind of tensor -> rules. Where no line says otherwise the head is Q6_K."""


@dataclass(frozen=True)
class Wish:
    """What is asked of the quantizer for one file."""

    precision: str
    groups: int
    n_layers: int
    large_llama: bool = False
    """A Llama of 80 layers with grouped heads: its V matrices get more bits."""
    head: str | None = None
    embedding: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> type."""
    importance: bool = False


@dataclass(frozen=True)
class Choice:
    """The type that the mix wants for a tensor and the one that its rows allow."""

    wanted: str
    type: str


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether the quantizer touches a tensor at all."""
    return len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")


def kind_of_tensor(name: str) -> str:
    return next((kind for pattern, kind in KINDS if re.search(pattern, name)), "other")


def choose_types(tensors: Mapping[str, tuple[int, ...]], wish: Wish) -> dict[str, Choice]:
    """The types of the matrices among `tensors` (name -> shape, row length last).

    Plain-float precisions take their own type for everything that no option names.
    """
    matrices = {name: shape for name, shape in tensors.items() if is_matrix(name, shape)}
    kinds = {name: kind_of_tensor(name) for name in matrices}
    tied = "output.weight" not in matrices
    counts: Counter[str] = Counter(kinds.values())
    for kind in ("down", "gate", "up"):  # libllama counts layers here, tensors elsewhere
        counts[kind] = wish.n_layers
    seen: Counter[str] = Counter()
    chosen: dict[str, Choice] = {}
    for name in sorted(matrices, key=_in_file_order):
        kind = "head" if tied and kinds[name] == "embedding" else kinds[name]
        width = matrices[name][-1]
        asked = _asked(name, kind, wish)
        if asked is not None:
            chosen[name] = Choice(asked, asked)
            continue
        mixed = _mixed(kind, wish, Place(seen[kind], counts[kind], wish.groups, wish.importance))
        seen[kind] += 1
        body = PRECISIONS[wish.precision].body
        misfit = kind == "head" and width % TYPES[body].block
        chosen[name] = Choice(mixed, "Q8_0" if misfit else fallback(mixed, width))
    return chosen


def requires_importance(chosen: Mapping[str, Choice], precision: str) -> list[str]:
    """The tensors that libllama would not write without an importance matrix."""
    needing = NEED_IMPORTANCE | ({"Q2_K"} if precision == "Q2_K_S" else set())
    tables = ("token_embd.weight", "output.weight")
    return [name for name, c in chosen.items() if c.type in needing and name not in tables]


def _in_file_order(name: str) -> tuple[int, str]:
    """libllama walks the layers in their order; what belongs to none comes first."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def _asked(name: str, kind: str, wish: Wish) -> str | None:
    """The type that an option names; a tied table is head and embedding in one."""
    if name == "token_embd.weight" and wish.embedding:
        return wish.embedding
    if kind == "head" and wish.head:
        return wish.head
    return wish.overrides.get(name)


def _mixed(kind: str, wish: Wish, place: Place) -> str:
    precision = PRECISIONS[wish.precision]
    if not precision.quantized:
        return precision.body
    rules = MIXES.get(wish.precision, {}).get(kind, (("Q6_K", _always),) * (kind == "head"))
    chosen = next((type_ for type_, holds in rules if holds(place)), precision.body)
    if wish.large_llama and kind == "v" and chosen in ("Q3_K", "Q4_K") and not _is_tiny(wish):
        return "Q5_K"
    return chosen


def _is_tiny(wish: Wish) -> bool:
    """IQ1 and IQ2 files have rules of their own for V, without the exception for 80 layers."""
    return wish.precision.startswith(("IQ1", "IQ2"))
