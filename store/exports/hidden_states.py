"""Export to the layout that speculators reads: ``hs_<i>.safetensors`` for the i-th row, with its tokens and hidden states.

Each file holds ``token_ids`` int64 [n] and ``hidden_states`` [n, L, H], one layer for each feature in the order asked for;
speculators takes the last one as the output of the last block, before the final norm.
Source: vllm-project/speculators 0.9.0, ``hs_connectors`` (FileTransfer) and ``speculators.train.data``.
"""

import json
from collections.abc import Sequence

import numpy as np

from store.codecs import decode
from store.exports.folder import ExportFolder
from store.features import FeatureKey
from store.reader import Store
from store.table import Ints
from store.tensors import NAMES, Tensor, write_tensors

SITES = ("hidden", "final", "input", "head_input")


def layers(store: Store, keys: Sequence[FeatureKey], named: bool) -> tuple[FeatureKey, ...]:
    """The features of each file in order: as ``named``, or all hidden states by layer.

    Raises:
        ValueError: none, of several passes, of different widths, or not a hidden state of every token.
    """
    if not named:
        keys = sorted((key for key in keys if key.site == "hidden" and key.positions == "all"), key=lambda key: (key.pass_name, key.layer))
    if not keys:
        raise ValueError(f"{store.path} stores no hidden state of all tokens, such as hidden.6@all; expected at least one")
    if wrong := [str(key) for key in keys if key.site not in SITES or key.positions != "all"]:
        raise ValueError(f"hidden-states: expected hidden states of all tokens such as hidden.6@all, found {', '.join(wrong)}")
    widths = {str(key): _width(store, key) for key in keys}
    if len(set(widths.values())) > 1 or len({key.pass_name for key in keys}) > 1:
        raise ValueError(f"hidden-states: expected features of one pass and one width, found {widths}; choose with --pass or --features")
    return tuple(keys)


def write_rows(store: Store, keys: Sequence[FeatureKey], rows: Ints, first: int, folder: ExportFolder) -> None:
    """One file for each of ``rows``; ``first`` is the number of the first among all rows that are exported."""
    for number, row in enumerate(rows, first):
        name = f"hs_{number}.safetensors"
        if folder.has(name):
            continue
        one = np.array([row])
        dtype, states = _states(store, keys, one)
        tensors = {
            "hidden_states": Tensor.of(dtype, np.stack(states, axis=1)),
            "token_ids": Tensor.of("I64", store.tokens("input_ids", one).astype(np.int64)),
        }
        with folder.file(name) as path:
            write_tensors(path, tensors, {"features": json.dumps([str(key) for key in keys]), "row": str(row)})


def _states(store: Store, keys: Sequence[FeatureKey], row: Ints) -> tuple[str, list[np.ndarray]]:
    """[n, H] of each feature: the stored bits where all are of one type that has no scale beside it, else float32."""
    found, specs = store.read_all(keys, row), [store.spec(key) for key in keys]
    dtypes = {spec.arrays[0].dtype for spec in specs}
    if len(dtypes) == 1 and all(spec.codec == "cast" for spec in specs):
        return NAMES[dtypes.pop()], [found[key][""] for key in keys]
    return "F32", [decode(spec, found[key])[""] for key, spec in zip(keys, specs, strict=True)]


def _width(store: Store, key: FeatureKey) -> int:
    return store.manifest.passes[key.pass_name].shape.width_of(key.site)
