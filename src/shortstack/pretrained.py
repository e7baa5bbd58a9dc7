"""Open a checkpoint in transformers, 4.57 or 5, so that it computes what the config says.

Left alone, transformers 4.57 ignores the rotation of a config written by 5, and Gemma 2's cap on
attention scores in its default attention, without a word.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError, one_line
from shortstack.families import FAMILIES, both_spellings

if TYPE_CHECKING:
    import torch

OLDER = "4."

IN_TUPLES = frozenset({"gemma2", "gemma3_text", "granite"})
"""Model types of 4.57 whose layers return a tuple that begins with the hidden states. The layers'
annotations say it of others, too, of which it is not true."""


def config_of(path: Path) -> Any:
    """config.json of a checkpoint as the installed transformers has to be told it."""
    import transformers
    from transformers import AutoConfig

    made = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not transformers.__version__.startswith(OLDER) or made.model_type not in FAMILIES:
        return made
    given = json.loads((path / "config.json").read_text(encoding="utf-8"))
    told = both_spellings(given, strict=True)
    made = AutoConfig.for_model(**told)
    made.name_or_path = str(path)
    return made


def attention_of(config: Any) -> dict[str, Any]:
    """The argument that makes transformers cap attention scores where the config wants it."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def layers_return_tuples(config: Any) -> bool:
    """Whether the decoder takes the first item of what a layer returns, not all of it."""
    import transformers

    older = transformers.__version__.startswith(OLDER)
    return older and config.get_text_config().model_type in IN_TUPLES


def load(
    path: Path,
    dtype: torch.dtype,
    *,
    text_only: bool = False,
    quantization: Any = None,
    device: Any = None,
) -> Any:
    """Load without network, remote code or pickles; refuse a folder that does not fit its config.

    transformers only warns when it invents a tensor or ignores one: the model would run, wrong.
    `text_only`: of a multimodal model the decoder alone. `quantization`: transformers' config of
    one. `device`: where tensors go as they are read; no copy of the whole lies in RAM first.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    there: dict[str, Any] = {} if device is None else {"device_map": {"": device}}
    if quantization is not None:
        there["quantization_config"] = quantization
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = config_of(path)
            # with output_loading_info it returns a pair, which its annotations do not say
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                config=config.get_text_config() if text_only else config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **attention_of(config),
                **there,
            )
    except (OSError, ValueError) as error:
        raise ShortstackError(
            f"transformers cannot open {path}: {one_line(str(error), 300)} "
            "Check that it is a model folder with config.json and *.safetensors."
        ) from None
    model, facts = loaded
    _check_loaded(path, facts)
    return model.eval()


def _check_loaded(path: Path, facts: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(filter(of_decoder, map(str, facts[kind])))
        if wrong:
            raise ShortstackError(
                f"{path}: tensor {wrong[0]} is {kind.split('_')[0]} ({len(wrong)} such): "
                "config.json disagrees with the tensors. Write the folder again."
            )


def of_decoder(name: str) -> bool:
    """Not of a tower that text does not pass; transformers 5 renamed the tensors of one."""
    towers = {tower for family in FAMILIES.values() for tower in family.others}
    return not any(tower in name for tower in towers)
