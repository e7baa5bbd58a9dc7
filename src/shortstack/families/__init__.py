"""What a model family looks like, as frozen data: tensor names, shapes, GGUF names, layer kinds.

Intake (GGUF to folder), surgery (folder to folder) and export (folder to GGUF) read the same
table, so a family is right everywhere or nowhere.
"""

from shortstack.families.fields import (
    REMOVED,
    check_rope,
    context_tokens,
    decoder_config,
    dims,
    family_of,
    layer_windows,
    removed_sub_blocks,
    rope_parameters,
    rotates,
    spell_out,
    window_note,
)
from shortstack.families.spelling import both_spellings
from shortstack.families.table import FAMILIES, Family, TensorRule, expected_tensors

__all__ = [
    "FAMILIES",
    "REMOVED",
    "Family",
    "TensorRule",
    "both_spellings",
    "check_rope",
    "context_tokens",
    "decoder_config",
    "dims",
    "expected_tensors",
    "family_of",
    "layer_windows",
    "removed_sub_blocks",
    "rope_parameters",
    "rotates",
    "spell_out",
    "window_note",
]
