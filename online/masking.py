"""Masked-language-model inputs (BERT, Devlin et al. 2019, section 3.1), drawn once when rows are built.

Draws come from a counter-based generator addressed by (seed, record, part, copy), so a text's maskings do not depend on
what stands around it, nor on how the corpus is cut into files. Only raw 64-bit output is used: NumPy promises that stream
for good, its distributions not.
"""

import numpy as np
from numpy.typing import NDArray

from online.batch import IGNORED

Ids = NDArray[np.int32]

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token and a random word; the rest stay as they are."""


def mask_tokens(
    ids: Ids, candidates: NDArray[np.bool_], *, probability: float, mask_id: int, words: Ids, seed: int, address: tuple[int, int, int]
) -> tuple[Ids, Ids]:
    """Choose each candidate with ``probability``, at least one, and hide it.

    Args:
        ids: [n] token ids.
        candidates: [n] tokens that may be chosen; at least one.
        words: ids that a chosen token may be replaced by.
        address: record, part and copy; maskings of different addresses are independent.

    Returns:
        [n] masked ids, and [n] labels: the original at chosen tokens, IGNORED elsewhere.
    """
    record, part, copy = address
    raw = np.random.Philox(key=[seed, 0], counter=[0, copy, part, record]).random_raw(3 * len(ids)).reshape(3, -1)
    choice, action = (raw[:2] >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    chosen = candidates & (choice < probability)
    if not chosen.any():
        chosen[np.where(candidates, choice, 1.0).argmin()] = True
    masked = chosen & (action < MASKED)
    random = chosen & (action >= MASKED) & (action < MASKED + RANDOM)
    inputs = ids.copy()
    inputs[masked] = mask_id
    inputs[random] = words[raw[2][random] % np.uint64(len(words))]
    return inputs, np.where(chosen, ids, np.int32(IGNORED)).astype(np.int32)
