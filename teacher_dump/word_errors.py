"""How near to the whole prediction what is kept of it comes: in what a student would learn from it.

With t the teacher's prediction, g = q - t is the gradient of KL(t || q) in a student's logits and e that of the loss on what is kept
(``lm_kd``). No student is known yet; q is the softmax of the same logits at twice the temperature, a student less sure of the same words,
whose tail has the teacher's shape: students early in training are further from it, and so is what they learn from likeliest words alone.

Shapes: U units (tokens), M some of them, V words, K kept words, P places, B bands.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from online.bands import in_bands, log_masses
from online.batch import Batch, Drawn, TopBanded, TopDrawn, TopK, Value
from online.derive import derive, route
from online.encode import assemble, encode, from_numpy, packed_value
from online.estimates import estimate
from online.statics import live_statics
from online.teacher import float_statics
from online.words import Words, as_words
from store.codecs.topband import starts
from store.codecs.topk import UNUSED
from store.features import FeatureKey
from store.forms import WordForm, word_form
from store.reader import Store
from teacher_dump.accuracy import SAMPLE_TOKENS, Live, sample
from teacher_dump.records import WordError
from teacher_dump.teacher import TeacherPass

TOKENS = 512
"""Of each feature that are looked at."""


class Sums:
    """Adds up what a WordError says."""

    def __init__(self, form: WordForm) -> None:
        self._form = form
        self._numbers = torch.zeros(6, dtype=torch.float64)
        self._means: list[Tensor] = []

    @property
    def tokens(self) -> int:
        return int(self._numbers[0])

    def add(self, logits_MV: Tensor, kept: Value) -> None:
        """Take in the whole predictions of some tokens, and what is kept of them."""
        logits_MV = logits_MV.double()
        t_MV, q_MV = logits_MV.softmax(-1), (logits_MV / 2).softmax(-1)
        target_MV = _target(kept, self._form, q_MV)
        exact_MV, found_MV = q_MV - t_MV, q_MV * target_MV.sum(-1, keepdim=True) - target_MV
        norms = [side.norm(dim=-1) for side in (exact_MV, found_MV)]
        cosine_M = (exact_MV * found_MV).sum(-1) / (norms[0] * norms[1]).clamp(min=torch.finfo(torch.float64).tiny)
        spread_MV = None if self._form.draws else _target(kept, self._form, torch.ones_like(q_MV))
        kl = 0.0 if spread_MV is None else torch.xlogy(t_MV, t_MV / spread_MV.clamp(min=1e-300)).sum().item()
        squares = [(found_MV - exact_MV).square().sum().item(), *(float(norm.square().sum()) for norm in norms)]
        angle = cosine_M.clamp(-1, 1).arccos().rad2deg().sum().item()
        self._numbers += torch.tensor([len(logits_MV), *squares, angle, kl], dtype=torch.float64)
        sums = [side.sum(0) for side in (exact_MV, found_MV)]
        self._means = [one + other for one, other in zip(self._means, sums, strict=True)] if self._means else sums

    def error(self) -> WordError:
        """Of all that was taken in, at least one token."""
        tokens, off, exact, found, angle, kl = self._numbers.tolist()
        mean_error = float((self._means[1] - self._means[0]).norm() / self._means[0].norm())
        return WordError(
            tokens=int(tokens),
            error=math.sqrt(off / exact),
            angle=angle / tokens,
            norm=math.sqrt(found / exact),
            mean_error=mean_error,
            kl=None if self._form.draws else kl / tokens,
        )


def _target(kept: Value, form: WordForm, q_MV: Tensor) -> Tensor:
    """[M, V] what the loss on what is kept draws q to; other words take the mass of their group in the shares that ``q_MV`` gives them."""
    if isinstance(kept, Drawn | TopDrawn):
        words = estimate(kept, form, 0)
        return torch.zeros_like(q_MV).scatter_add_(-1, words.ids, words.weights.double())
    assert isinstance(kept, TopK | TopBanded)
    unused_MK = kept.log_probs <= UNUSED
    ids_MK = torch.where(unused_MK, kept.ids[:, :1], kept.ids)
    logs_MB = kept.log_tail[:, None] if isinstance(kept, TopK) else log_masses(kept.bands)
    log_others_MV = q_MV.log().scatter(-1, ids_MK, -torch.inf)
    log_sums_MB = in_bands(log_others_MV, logs_MB.shape[-1]).clamp(min=torch.finfo(torch.float64).min)
    ends_B = torch.tensor(starts(q_MV.shape[-1], logs_MB.shape[-1])[1:], dtype=torch.int64, device=q_MV.device)
    band_V = torch.bucketize(torch.arange(q_MV.shape[-1], device=q_MV.device), ends_B, right=True)
    target_MV = (log_others_MV - log_sums_MB[:, band_V] + logs_MB.double()[:, band_V]).exp()
    return target_MV.scatter_add(-1, ids_MK, kept.log_probs.double().masked_fill(unused_MK, -torch.inf).exp())


def word_errors(teacher: TeacherPass, answers: Sequence[Live]) -> dict[str, WordError]:
    """Feature -> error of each form of word predictions that the pass has, as stored or as derived from what is stored, on a few rows."""
    wanted = worded([*(spec.feature for spec in teacher.specs), *teacher.plan.derived])
    if not wanted:
        return {}
    statics, loaded = float_statics(live_statics(teacher.loaded, teacher.plan.statics)), teacher.loaded
    sums = {key: Sums(form) for key, form in wanted.items()}
    for answer in answers:
        with torch.no_grad():
            stored = {}
            for spec in teacher.specs:
                arrays = encode(spec.feature, answer.values[_plain(spec.feature)], answer.batch, spec, answer.sources)
                stored[spec.feature] = assemble(spec.feature, spec, arrays, answer.batch)
            found = derive(wanted, stored, statics, answer.batch, loaded.shape, loaded.wiring)
            for key in wanted:
                add(sums[key], key, answer.values[_plain(key)], found[key], answer.batch)
    return {str(key): one.error() for key, one in sums.items() if one.tokens}


def worded(keys: Sequence[FeatureKey]) -> dict[FeatureKey, WordForm]:
    """Those of ``keys`` that have a form of word predictions, ``select`` left out."""
    forms = {key: word_form(key.form) for key in keys}
    return {key: form for key, form in forms.items() if form is not None}


def add(sums: Sums, key: FeatureKey, whole: Value, kept: Value, batch: Batch) -> None:
    """Take in the tokens of a batch, ``whole`` and as ``kept``, until there are TOKENS."""
    packed = packed_value(_plain(key), whole, batch)
    assert isinstance(packed, Tensor | Words)
    words, packed_kept = packed if isinstance(packed, Words) else as_words(packed), packed_value(key, kept, batch)
    assert isinstance(packed_kept, TopK | Drawn | TopDrawn | TopBanded)
    columns = [column_U.split(words.parts()) for column_U in packed_kept]
    for logits_MV, *chunk in zip(words.chunks(), *columns, strict=True):
        left = TOKENS - sums.tokens
        if left <= 0:
            return
        sums.add(logits_MV[:left], type(packed_kept)(*(column[:left] for column in chunk)))


def measured_again(store: Store, pass_name: str) -> dict[str, WordError]:
    """The errors of a complete pass from its store alone: of forms for which the whole prediction follows from what is stored."""
    info = store.manifest.passes[pass_name]
    specs = {spec.feature: spec for spec in info.features}
    names = {static.name: static.dtype for static in info.statics}
    known = worded([FeatureKey.parse(key) for key in info.requested])
    wanted = {key: form for key, form in known.items() if route(_plain(key), specs, names, info.shape, info.wiring) is not None}
    if not wanted:
        return {}
    arrays, device = store.statics(pass_name), torch.device("cpu")
    statics = {name: from_numpy(arrays[name], dtype, device) for name, dtype in names.items()}
    sums = {key: Sums(form) for key, form in wanted.items()}
    for batch, _ in sample(store, info.batch_tokens or SAMPLE_TOKENS):
        rows = batch.rows.numpy()
        have = {key: assemble(key, spec, store.read(key.of(pass_name), rows), batch) for key, spec in specs.items()}
        found = derive([*wanted, *map(_plain, wanted)], have, statics, batch, info.shape, info.wiring)
        for key in wanted:
            add(sums[key], key, found[_plain(key)], found[key], batch)
    return {str(key): one.error() for key, one in sums.items() if one.tokens}


def _plain(key: FeatureKey) -> FeatureKey:
    return replace(key, form="")
