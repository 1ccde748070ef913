"""What one rank finds when it loads models sharded and whole and compares them; run by on_ranks."""

import contextlib
import os
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from online.batch import IGNORED, Batch, Features, dense
from online.capture import Capture
from online.encode import packed_in_form
from online.models import LM_HEADS, LoadedModel, ModelSpec, forward, load_model
from online.replica import joined
from online.sharding import Sharding
from online.statics import live_statics
from online.words import Words
from store.features import FeatureKey
from store.shape import ModelShape

VOCAB, PAD, LAYERS = 61, 1, 3
STATICS = ["final_norm.weight", "transform.weight", "transform_norm.bias", "head.weight", "head.bias"]
BLOCK_STATICS = ["query.weight", "key.weight", "value.bias", "norm.weight", "query_norm.weight", "rotary"]


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keys of ``arguments``: ``sharding``; ``equal`` and ``refused``, lists of ``spec`` (a ModelSpec) with ``sharding`` where it differs;
    ``together``, whether all ranks get the same batch, as tensor parallelism wants it; ``interrupted``, whether a pass fails in
    block 2 before anything is compared, of all models or, in a case, of one.

    What ``main`` returns: for ``equal`` what ``_compare`` returns, for ``refused`` the messages (empty where a model loads), and
    ``later``, the elements of a model that is loaded whole afterwards.
    """
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ["RANK"]))
    common = arguments["sharding"]
    answer: dict[str, Any] = {"equal": [], "refused": []}
    with joined(common["size"], grouped=True) as replica:
        for case in arguments["equal"]:
            spec, sharding = _case(case, common)
            whole, split = load_model(spec), load_model(spec, sharding=sharding)
            if case.get("interrupted", arguments.get("interrupted")):
                _fail(split)
            answer["equal"].append(_compare(whole, split, 0 if arguments.get("together") else replica.rank))
        for case in arguments.get("refused", []):
            spec, sharding = _case(case, common)
            try:
                load_model(spec, sharding=sharding)
                answer["refused"].append("")
            except ValueError as error:
                answer["refused"].append(str(error))
        answer["later"] = sum(weight.numel() for weight in load_model(_case(arguments["equal"][0], common)[0]).model.parameters())
        dist.barrier()
    return answer


def _case(case: dict[str, Any], common: dict[str, Any]) -> tuple[ModelSpec, Sharding]:
    return ModelSpec.model_validate(case["spec"]), Sharding.model_validate({**common, **case.get("sharding", {})})


def _compare(whole: LoadedModel, split: LoadedModel, seed: int) -> dict[str, Any]:
    """The largest differences of features and weights, and how many elements of weights were there at once."""
    keys = _keys(whole.shape)
    differences: dict[str, float] = {}
    for number in range(3):  # the third pass runs on the order of modules that DeepSpeed recorded in the second
        batch = _batch(number * 100 + seed)
        with torch.no_grad():
            expected, found = (_features(loaded, keys, batch) for loaded in (whole, split))
        for key in keys:
            difference = float((dense(expected, key) - dense(found, key)).abs().max())
            differences[str(key)] = max(difference, differences.get(str(key), 0.0))
    names = [*STATICS, *(f"{layer}.{name}" for layer in range(1, LAYERS + 1) for name in BLOCK_STATICS)]
    ours, theirs = live_statics(whole, names), live_statics(split, names)
    assert ours.keys() == theirs.keys()
    return {
        "features": differences,
        "statics": {name: float((tensor.detach() - theirs[name]).abs().max()) for name, tensor in ours.items()},
        "words": _words(split, _batch(seed)) if whole.shape.head in LM_HEADS and _is_shared(split) else {},
        "same_fingerprint": whole.fingerprint == split.fingerprint,
        "local": split.weights.local_elements(),
        "most_live": _most_live(split, _batch(seed)),
        "all": sum(weight.numel() for weight in whole.model.parameters()),
    }


def _is_shared(loaded: LoadedModel) -> bool:
    """Whether ranks hold the head together and work on the same rows."""
    return loaded.word_head is not None and loaded.weights.columns(loaded.word_head) is not None


def _words(loaded: LoadedModel, batch: Batch) -> dict[str, Any]:
    """By form: which words it keeps, and the largest difference of its numbers, from shares of the ranks and from all logits on each."""
    with torch.no_grad():
        words = _features(loaded, [key := FeatureKey.parse("lm_logits")], batch)[key]
    assert isinstance(words, Words)
    assert words.share is not None
    answer: dict[str, Any] = {}
    for form in ("top5", "top5p9", "top3band4", "select"):
        of = replace(key, form=form)
        found, expected = (packed_in_form(of, value, batch, (3, VOCAB - 1)) for value in (words, replace(words, share=None)))
        pairs = [(one.nan_to_num(), other.nan_to_num()) for one, other in zip(found[1:], expected[1:], strict=True)]
        answer[form] = torch.equal(found[0], expected[0]), max(float((one - other).abs().max()) for one, other in pairs)
    return answer


def _most_live(loaded: LoadedModel, batch: Batch) -> int:
    """The most elements of weights that are gathered while some module runs."""
    seen: list[int] = []

    def look(module: torch.nn.Module, args: object) -> None:
        seen.append(sum(weight.numel() for weight in loaded.model.parameters() if not isinstance(weight, DTensor)))

    hooks = [module.register_forward_pre_hook(look) for module in loaded.model.modules()]
    with torch.no_grad():
        forward(loaded, batch)
    for hook in hooks:
        hook.remove()
    return max(seen)


def _fail(loaded: LoadedModel) -> None:
    def fail(module: torch.nn.Module, args: object, output: object) -> None:
        raise MemoryError

    handle = loaded.block(2).register_forward_hook(fail)
    with contextlib.suppress(MemoryError), torch.no_grad():
        forward(loaded, _batch(0))
    handle.remove()


def _features(loaded: LoadedModel, keys: list[FeatureKey], batch: Batch) -> Features:
    with Capture(loaded, keys) as capture:
        forward(loaded, batch)
    return capture.features(batch)


def _keys(shape: ModelShape) -> list[FeatureKey]:
    layers = range(1, shape.layers + 1)
    names = ["hidden.0", "final"]
    sites = ("hidden", "input", "query", "key", "value", "attention_scores", "attention_probs") if shape.attends else ("hidden",)
    names += [f"{site}.{i}" for site in sites for i in layers]
    if shape.head in LM_HEADS:
        names += ["head_input", "lm_logits", "lm_logits@labels"]
    if shape.labels:
        names += ["task_logits@row" if shape.head in ("classification", "multiple_choice") else "task_logits@all"]
    return [FeatureKey.parse(name) for name in names]


def _batch(seed: int) -> Batch:
    """Three rows of other lengths on each rank."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (3,), generator=generator)
    ids = torch.randint(4, VOCAB, (3, int(lengths.max())), generator=generator)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    ids = torch.where(mask, ids, PAD)
    labels = torch.where(mask & ((ids % 3 == 0) | (torch.arange(ids.shape[1]) == 1)), ids, IGNORED)
    order = torch.arange(3)
    return Batch(order, ids, mask, None, None, None, labels, None, order)
