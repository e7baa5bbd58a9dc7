"""GGUF architectures that can lose layers, and what llama.cpp decides in them by layer number.

Read from the hparams and graph of every `src/models/*.cpp` named here, and from the loader, of the
llama.cpp inside llama-cpp-python 0.3.36. An architecture is in the table only if its file was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shortstack.errors import unknown

WINDOW = "attention.sliding_window"
WINDOW_PATTERN = "attention.sliding_window_pattern"
HEADS = "attention.head_count"
KV_HEADS = "attention.head_count_kv"
FEED_FORWARD = "feed_forward_length"
MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS."""
PATTERN_READ_SINCE = "llama-cpp-python 0.3.36"
"""The first release whose llama.cpp reads the pattern as one flag a layer; 0.3.35 reads a period
and passes over an array without a word."""


@dataclass(frozen=True)
class DepthRule:
    """Numbers of layers at which llama.cpp builds another graph, whatever the file says."""

    depths: range
    what: str
    attention_scale: bool = False
    """At these depths scores are scaled by (embedding length // heads) ** -0.5, at others by
    key length ** -0.5."""
    scale_in: str | None = None
    """Tensor of a layer (F32, multiplied into the queries) that can take up the difference."""


@dataclass(frozen=True)
class GgufArch:
    """An architecture's name in `general.architecture`, and its hazards."""

    name: str
    window_period: int | None = None
    """Every so many layers the last one sees everything, the others a window: what llama.cpp
    assumes where the file has no WINDOW_PATTERN. None: no window depends on the layer."""
    window_needs_key: bool = True
    """Layers are windowed only if the file's WINDOW is above 0."""
    unrotated_period: int | None = None
    """Every so many layers the last one has no rotation; no key can say otherwise."""
    depth_rule: DepthRule | None = None
    needs_keys: tuple[str, ...] = ()
    """Keys without which llama.cpp computes their value from the number of layers."""
    first_needs: tuple[str, ...] = ()
    """Per-layer keys that must not be 0 in the first layer."""
    last_needs: tuple[str, ...] = ()
    """Per-layer keys that must not be 0 in the last layer."""

    def windowed(self, n_layers: int, period: int | None = None) -> tuple[bool, ...]:
        """Which layers see only a window where the file gives a period or nothing.

        `llama_hparams::set_swa_pattern`: layer i sees everything if i % period == period - 1; a
        period of 0 windows every layer.
        """
        every = self.window_period if period is None else period
        if every is None:
            return (False,) * n_layers
        return tuple(every == 0 or i % every != every - 1 for i in range(n_layers))

    def rotates(self, layer: int) -> bool:
        """Whether llama.cpp rotates queries and keys in the layer of this number."""
        every = self.unrotated_period
        return every is None or (layer + 1) % every != 0


PLAIN = (
    *("arcee", "apertus", "bitnet", "bloom", "chatglm", "codeshell", "ernie4_5", "exaone"),
    *("falcon", "gemma", "glm4", "gpt2", "gptneox", "granite", "hunyuan-dense", "internlm2"),
    *("jais", "jais2", "llama", "maincoder", "mistral3", "mpt", "nemotron", "olmo", "openelm"),
    *("orion", "pangu-embedded", "phi2", "phi3", "plamo", "plm", "qwen", "qwen2", "qwen2vl"),
    *("qwen3", "refact", "seed_oss", "stablelm", "starcoder", "starcoder2", "xverse"),
)
"""Nothing in these depends on a layer's number. Phi-3 has a window key that llama.cpp ignores."""

WITH_HAZARDS = (
    GgufArch("cohere2", window_period=4, window_needs_key=False),
    GgufArch("command-r", depth_rule=DepthRule(range(64, MAX_LAYERS + 1), "query and key norms")),
    # n_embd_head_k is read only if layer 0 has heads; a last layer without MLP loses its output.
    GgufArch("deci", first_needs=(HEADS, KV_HEADS), last_needs=(FEED_FORWARD,)),
    GgufArch("exaone4", depth_rule=DepthRule(range(64, 65), "sliding windows")),
    GgufArch(
        "gemma2",
        window_period=2,
        window_needs_key=False,
        depth_rule=DepthRule(range(46, 47), "the attention scale", attention_scale=True),
    ),
    GgufArch(
        "gemma3",
        window_period=6,
        depth_rule=DepthRule(range(62, 63), "the attention scale", True, "attn_q_norm.weight"),
    ),
    GgufArch("minicpm", needs_keys=("residual_scale",)),
    GgufArch("olmo2", window_period=4),
    GgufArch("plamo3", window_period=8),
    GgufArch("smollm3", unrotated_period=4),
)

ARCHS: Mapping[str, GgufArch] = {
    arch.name: arch for arch in (*(GgufArch(name) for name in PLAIN), *WITH_HAZARDS)
}

PER_LAYER = (*(HEADS, KV_HEADS, FEED_FORWARD, WINDOW_PATTERN, "attention.rope_pattern"),)
"""Keys behind `ARCH.` that hold one value a layer where they are arrays."""

PER_LAYER_ANYWHERE = ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps")
"""Full keys that hold one value a layer where they are arrays."""

NOT_PER_LAYER = ("rope.dimension_sections", "classifier.output_labels")
"""Keys behind `ARCH.` whose arrays have nothing to do with layers."""

BLOCKERS: Mapping[str, str] = {
    "adapters.count": "switched adapters",
    "attention.shared_kv_layers": "layers that share keys and values",
    "decoder_block_count": "an encoder and a decoder",
    "expert_count": "a mixture of experts",
    "full_attention_interval": "recurrent layers in between",
    "hash_layer_count": "hash layers",
    "interleave_moe_layer_step": "a mixture of experts",
    "leading_dense_block_count": "leading dense layers",
    "moe_every_n_layers": "a mixture of experts",
    "n_deepstack_layers": "image features that enter at numbered layers",
    "nextn_predict_layers": "extra layers for multi-token prediction",
    "num_loops": "layers that run more than once",
    "ssm.state_size": "a state-space model",
}
"""Key behind `ARCH.` -> what its value above 0 means; such a file cannot be cut layer by layer."""


def arch(name: str) -> GgufArch:
    """The architecture of this name. Raises ShortstackError naming the known ones."""
    if name not in ARCHS:
        raise unknown("GGUF architecture", name, ARCHS)
    return ARCHS[name]
