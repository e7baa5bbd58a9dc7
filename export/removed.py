"""Sub-blocks that a checkpoint says are gone: exporters leave them out, so they must be zero."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export.weights import Weights
from shortstack.families import REMOVED


def check_removed(checkpoint: Checkpoint) -> None:
    """Raise ShortstackError if a removed sub-block still writes something.

    transformers runs whatever lies in the file: an export without the sub-block would be another
    model, trained further since the cut, or with an edited config.
    """
    weights, family = Weights(checkpoint), checkpoint.family
    for part, layers in checkpoint.removed.items():
        for layer in layers:
            stem = family.layer_prefix.format(i=layer) + family.outputs[part]
            for name in (f"{stem}.weight", f"{stem}.bias"):
                if name in checkpoint.tensors and weights.stored(name).any():
                    raise ShortstackError(
                        f"{checkpoint.path}: {REMOVED} in config.json says that the {part} of "
                        f"layer {layer} is gone, but {name} is not zero. "
                        "Remove it again: shortstack prune --drop "
                        f"{layer}.{part}"
                    )
