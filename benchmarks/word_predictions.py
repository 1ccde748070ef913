"""How near the gradient from what is kept of a word prediction comes to that from all of it, beside what other tools keep.

    python benchmarks/word_predictions.py --store STORE --teacher FOLDER --student FOLDER [FOLDER ...] [--tokens 2048]
        [--distillkit FOLDER] --save benchmarks/results/word_predictions.json

Rows come from a store; the words that they are scored on are predicted by a teacher and by students of one vocabulary (a FOLDER, or
FOLDER:2,4,6 for some of its blocks), in float32. Each form is made by the store's own codec, in the types that it would be stored in, and
its gradient is that of ``lm_kd``; peers are in word_peers.py, on the same logits. With g = p - t the gradient of KL(t || p) in a student's
logits, and e that of a form, of each token:

- ``error``: |e - g| / |g|, of all tokens together (root of the summed squares); ``token_error``: its mean over tokens;
- ``angle``: degrees between e and g, mean over tokens; ``norm``: |e| / |g|, mean over tokens;
- ``batch_error``: the same error of gradients that are first averaged over 256 tokens, mean over such batches;
- ``kl``: KL(t || what the form stands for), nats, where it stands for a distribution; words outside share the rest evenly (in their band).

``bytes`` are of a token, before compression where not said otherwise. --distillkit names a checkout of github.com/arcee-ai/DistillKit.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc
from timing import machine
from torch import Tensor, nn
from torch.nn import functional as F
from word_peers import Kept, Loss, distillkit, megatron, random_sampling

from online.bands import log_masses
from online.batch import Batch, Features, TopBanded, TopK, Value, dense
from online.capture import Capture
from online.collate import collate
from online.encode import assemble, encode
from online.models import LoadedModel, ModelSpec, forward, load_model
from store.codecs import decode as numpy_decode
from store.codecs import encode as numpy_encode
from store.codecs import feature_spec
from store.codecs.topband import starts
from store.features import FeatureKey, StoreDtype
from store.reader import Store
from student_train.evaluate import held_out_rows
from student_train.methods.lm_kd import LMKD
from student_train.moment import Moment

LOGITS, INPUT = FeatureKey.parse("lm_logits@labels"), FeatureKey.parse("head_input@labels")
BLOSC = Blosc("zstd", shuffle=Blosc.BITSHUFFLE)
GROUP = 256
DRAWS = 16
"""Independent sets that the mean gradient of a random form is taken over, at most."""
FORMS: dict[str, dict[str, Any]] = {
    "top8": {"top": 8},
    "top6band12": {"top": 6, "bands": 12},
    "top4draw9": {"top": 4, "draws": 9},
    "draw25": {"draws": 25},
    "top27": {"top": 27},
    "top20band30": {"top": 20, "bands": 30},
    "top16draw22": {"top": 16, "draws": 22},
    "draw80": {"draws": 80},
    "top64p95": {"top": 64, "nucleus": 0.95},
    "top56band72": {"top": 56, "bands": 72},
    "top73": {"top": 73},
}
DISTILLKIT: tuple[tuple[int, int, list[Any], str], ...] = (
    (14, 1, [0, 1, "sqrt"], "bfloat16"),
    (50, 1, [0, 1, "sqrt"], "float32"),  # "budget" in its README
    (128, 16, [0, 1, 2, 3, 4, "sqrt"], "float32"),  # "recommended"
)
"""k, exact values, terms, their type."""
INPUTS: tuple[StoreDtype, ...] = ("float32", "float16", "bfloat16", "int8", "float8")


def main() -> None:
    """Measure every form against every student and write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--distillkit", type=Path)
    parser.add_argument("--save", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    store = Store.open(options.store)
    teacher = loaded(options.teacher, store)
    batches = list(held_out(store, options.tokens))
    taught = [answers(teacher, batch, (LOGITS, INPUT)) for batch in batches]
    kept = {**stored_forms(teacher, batches, taught), **recomputed(teacher, taught)}
    kept |= peers(torch.cat([dense(features, LOGITS) for features in taught]), options.distillkit)
    figures: dict[str, Any] = {"machine": machine(), "words": teacher.shape.vocab, "students": {}}
    for name in options.student:
        student = loaded(name, store)
        logits = [dense(answers(student, batch, (LOGITS,)), LOGITS) for batch in batches]
        exact = torch.cat([dense(features, LOGITS) for features in taught])
        rows = [measured(one, exact, torch.cat(logits)) for one in kept.values()]
        figures["tokens"] = len(exact)
        figures["students"][name] = dict(zip(kept, rows, strict=True))
        options.save.write_text(json.dumps(figures, indent=1) + "\n")


@dataclass(frozen=True)
class Form:
    """What is kept of all tokens' predictions."""

    bytes: float
    gradients: Callable[[Tensor], Iterator[Tensor]]
    """Of the loss in a student's logits [N, V], summed over tokens: one, or one for each set of draws."""
    implied: Tensor | None
    """[N, V] what it stands for; None for draws."""


def loaded(name: str, store: Store) -> LoadedModel:
    """A model of a folder, or of some of its blocks: ``FOLDER:2,4,6``."""
    folder, _, blocks = name.partition(":")
    model = load_model(ModelSpec(model=Path(folder), head="causal_lm" if store.manifest.rows.objective == "causal" else "masked_lm"))
    if blocks:
        chosen = [model.block(int(number)) for number in blocks.split(",")]
        whole = next(part for part in model.model.modules() if isinstance(part, nn.ModuleList) and model.block(1) in list(part))
        del whole[:]
        whole.extend(chosen)
    model.model.eval()
    return model


def held_out(store: Store, tokens: int) -> Iterator[Batch]:
    """Batches of held-out rows until so many words are scored."""
    found, rows = 0, held_out_rows(store, "dev", None)
    for start in range(0, len(rows), 16):
        batch = collate(store, rows[start : start + 16])
        yield batch
        found += len(batch.scored)
        if found >= tokens:
            return


@torch.no_grad()
def answers(model: LoadedModel, batch: Batch, keys: tuple[FeatureKey, ...]) -> Features:
    """What a model answers for ``batch``."""
    with Capture(model, keys) as capture:
        forward(model, batch)
    return {key: dense(features, key) for features in [capture.features(batch)] for key in keys}


def stored_forms(teacher: LoadedModel, batches: list[Batch], taught: list[Features]) -> dict[str, Form]:
    """Forms of word predictions, as a store with numbers in float16 would give them back."""
    found = {}
    for form, options in FORMS.items():
        samples = {"samples": DRAWS} if "draws" in options else {}
        method = LMKD(teacher.shape, teacher.shape, **options, **samples)
        (key,) = method.teacher_keys
        spec = feature_spec(key, "float16", teacher.shape.vocab)
        arrays = [encode(key, features[LOGITS], batch, spec) for batch, features in zip(batches, taught, strict=True)]
        values = [assemble(key, spec, one, batch) for batch, one in zip(batches, arrays, strict=True)]
        found[form] = Form(
            bytes_of(form, arrays, samples, spec.unit_bytes),
            partial(of_method, method, key, batches, values),
            implied(values, teacher.shape.vocab),
        )
    return found


def bytes_of(form: str, arrays: list[dict[str, Any]], samples: dict[str, int], unit_bytes: int) -> float:
    """Of a token in one set of draws; places that stay unused are counted as compressed, all units together."""
    if "p" not in form.removeprefix("top") and not form.startswith("draw"):
        own = unit_bytes if not samples else sum(one.shape[1] * one.dtype.itemsize for name, one in arrays[0].items() if name != "ids")
        if samples:
            head, draws = (int(number) for number in form.removeprefix("top").split("draw"))
            own += (head + draws) * arrays[0]["ids"].dtype.itemsize
        return float(own)
    packed, units = 0, 0
    for one in arrays:
        for name, array in one.items():
            width = array.shape[1] // samples.get("samples", 1)
            packed += len(BLOSC.encode(np.ascontiguousarray(array[:, :width])))
            units += len(array) if name == "ids" else 0
    return packed / units


def of_method(method: LMKD, key: FeatureKey, batches: list[Batch], values: list[Value], logits_NV: Tensor) -> Iterator[Tensor]:
    """The gradient of ``lm_kd``; of each set of draws by itself."""
    assert method.form is not None
    for number in range(method.form.samples):
        method.moment = Moment(step=number, steps=method.form.samples, epoch_steps=1.0, seed=0)
        start, parts = 0, []
        for batch, value in zip(batches, values, strict=True):
            part = logits_NV[start : start + len(batch.scored)].clone().requires_grad_()
            start += len(part)
            (loss,) = method({method.student_key: part}, {key: value}, batch).values()
            parts.append(torch.autograd.grad(loss, part)[0])
        yield torch.cat(parts)


def implied(values: list[Value], words: int) -> Tensor | None:
    """[N, V] the distribution that likeliest words stand for, the others' mass spread evenly over them, or over those of their band."""
    found = []
    for value in values:
        if isinstance(value, TopBanded):
            bounds, log_rest = (*starts(words, value.bands.shape[-1]), words), log_masses(value.bands)
        elif isinstance(value, TopK):
            bounds, log_rest = (0, words), value.log_tail[:, None]
        else:
            return None
        t = value.log_probs.exp()
        others = torch.ones(len(t), words).scatter_(-1, value.ids, 0.0)  # an unused place names word 0, which then counts as kept
        sizes = [end - start for start, end in pairwise(bounds)]
        parts = [
            part * (mass / part.sum(-1).clamp(min=1))[:, None]
            for part, mass in zip(others.split(sizes, -1), log_rest.exp().unbind(-1), strict=True)
        ]
        found.append(torch.cat(parts, -1).scatter_add_(-1, value.ids, t))
    whole = torch.cat(found).clamp(min=1e-12)
    return whole / whole.sum(-1, keepdim=True)


def recomputed(teacher: LoadedModel, taught: list[Features]) -> dict[str, Form]:
    """Word logits from what the head took in, in the types that it can be stored in, by the head's own weights."""
    head, found = teacher.word_head, {}
    assert head is not None
    whole = torch.cat([dense(features, INPUT) for features in taught]).numpy()
    for dtype in INPUTS:
        spec = feature_spec(INPUT, dtype, whole.shape[1])
        with torch.no_grad():
            logits_NV = head(torch.from_numpy(numpy_decode(spec, numpy_encode(spec, whole))[""]))
        t_NV = logits_NV.softmax(-1)
        found[f"head_input {dtype}"] = Form(spec.unit_bytes, partial(of_target, t_NV), t_NV)
    return found


def of_target(t_NV: Tensor, logits_NV: Tensor) -> Iterator[Tensor]:
    """p - t."""
    yield logits_NV.softmax(-1) - t_NV


def peers(logits_NV: Tensor, folder: Path | None) -> dict[str, Form]:
    """Other tools at about the same bytes."""
    found: dict[str, Kept] = {f"Megatron-LM top {k}": megatron(logits_NV, k) for k in (9, 27, 73)}
    for k, exact, terms, kind in DISTILLKIT if folder is not None else ():
        for normalised in (False, True):
            name = f"DistillKit k={k} exact {exact}, {len(terms)} terms{', normalize_t' if normalised else ''}"
            found[name] = distillkit(folder, logits_NV, k, exact, terms, kind, normalised)
    forms = {}
    for name, kept in found.items():
        for tail, loss in kept.losses.items():
            forms[f"{name}, {tail}"] = Form(kept.bytes, partial(of_loss, (loss,)), kept.implied)
    for draws in (22, 82):
        sets = [random_sampling(logits_NV, draws) for _ in range(DRAWS)]
        forms[f"RS-KD {draws} draws, 3 bytes a word"] = Form(sets[0].bytes, partial(of_loss, [one.losses[""] for one in sets]), None)
    return forms


def of_loss(losses: Sequence[Loss], logits_NV: Tensor) -> Iterator[Tensor]:
    """Of each loss."""
    for loss in losses:
        part = logits_NV.clone().requires_grad_()
        yield torch.autograd.grad(loss(part).sum(), part)[0]


def measured(form: Form, exact_NV: Tensor, student_NV: Tensor) -> dict[str, float]:
    """Errors of a form's gradients (of draws: of one set, and of the mean over all) and of what it stands for."""
    g_NV = student_NV.softmax(-1) - exact_NV.softmax(-1)
    first, total, sets = None, torch.zeros_like(g_NV), 0
    for e_NV in form.gradients(student_NV):
        first, total, sets = e_NV if first is None else first, total + e_NV, sets + 1
    assert first is not None
    size_N, off_N = g_NV.norm(dim=-1), (first - g_NV).norm(dim=-1)
    scores = {
        "bytes": form.bytes,
        "error": float(off_N.square().sum().sqrt() / size_N.square().sum().sqrt()),
        "token_error": float((off_N / size_N).mean()),
        "angle": float(F.cosine_similarity(first, g_NV, dim=-1).clamp(-1, 1).acos().rad2deg().mean()),
        "norm": float((first.norm(dim=-1) / size_N).mean()),
        "batch_error": averaged(first, g_NV),
    }
    if sets > 1:
        scores |= {
            "sets": sets,
            "mean_error": averaged(total / sets, g_NV),
            "mean_token_error": float(((total / sets - g_NV).norm(dim=-1) / size_N).mean()),
        }
    if form.implied is not None:
        scores["kl"] = float((exact_NV.softmax(-1) * (exact_NV.log_softmax(-1) - form.implied.log())).sum(-1).mean().clamp(min=0))
    return {name: round(value, 6) for name, value in scores.items()}


def averaged(e_NV: Tensor, g_NV: Tensor) -> float:
    """Error of gradients averaged over GROUP tokens."""
    groups = [(e.mean(0), g.mean(0)) for e, g in zip(e_NV.split(GROUP), g_NV.split(GROUP), strict=True) if len(e) == GROUP]
    return float(torch.stack([(e - g).norm() / g.norm() for e, g in groups]).mean())


if __name__ == "__main__":
    main()
