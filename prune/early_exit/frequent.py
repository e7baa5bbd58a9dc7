"""The tokens that are frequent in text: what a draft may say (`vocabulary` of drafters)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError


def frequent_tokens(documents: Iterable[Sequence[int]], count: int) -> NDArray[np.int64]:
    """Ids of the `count` most frequent tokens of the documents, ascending; all where there are
    fewer. Of equally frequent ones the lower id.

    FR-Spec (arXiv:2502.14856, section 3.2) ranks tokens so. Take text like that to be generated,
    none that is tested on. Raises ShortstackError where there is no token or none is asked for.
    """
    found = Counter(token for ids in documents for token in ids)
    if count < 1 or not found:
        raise ShortstackError(
            f"{count} frequent tokens of a text of {len(found)} different ones are no vocabulary. "
            "Give text, and ask for at least one."
        )
    ranked = sorted(found, key=lambda token: (-found[token], token))
    return np.array(sorted(ranked[:count]), dtype=np.int64)
