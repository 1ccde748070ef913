"""Knowledge distillation from word predictions, dense or from the K likeliest words.

Shapes: U tokens, V words, K kept words.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from online.bands import in_bands, log_masses
from online.batch import Batch, Drawn, Features, TopBanded, TopDrawn, TopK
from online.encode import packed_value
from online.estimates import Estimate, estimate
from online.words import each
from store.codecs.topk import UNUSED
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Temperature, Terms, check_equal, check_site, check_vocabularies
from student_train.methods.divergences import (
    adaptive_kl,
    first_words,
    forward_kl,
    jsd,
    mse,
    reverse_kl,
    shared,
    skew_forward,
    skew_reverse,
    total_variation,
)
from student_train.methods.losses import MASKED, kl, unit_count, units, word_logits
from student_train.methods.losses import mse as raw_mse
from student_train.methods.sampled_words import chosen_form, estimated_kl

Name = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward", "skew_reverse", "adaptive_kl", "total_variation", "mse", "raw_mse"]


class Entry(NamedTuple):
    """What goes with a divergence."""

    of: Callable[..., Tensor]
    option: str = ""
    """The parameter it has, and its value where none is given."""
    usual: float = 0.0
    power: int = 2
    """Of the temperature, that the divergence is multiplied by."""
    top: bool = False
    """Whether it looks only where the teacher's mass is, so that its K likeliest words serve."""


DIVERGENCES: dict[Name, Entry] = {
    "forward_kl": Entry(forward_kl, top=True),
    "reverse_kl": Entry(reverse_kl),
    "jsd": Entry(jsd, "beta", 0.5),
    "skew_forward": Entry(skew_forward, "alpha", 0.1, top=True),
    "skew_reverse": Entry(skew_reverse, "alpha", 0.1),
    "adaptive_kl": Entry(adaptive_kl, "head", 0.5),
    "total_variation": Entry(total_variation, power=1),
    "mse": Entry(mse, power=0),
    "raw_mse": Entry(raw_mse, power=0),
}


class LMKD(Method):
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) over words, at all, the labelled or (the same for MLM) the masked tokens.

    Hinton et al. 2015, arXiv 1503.02531, for every token; add ``lm_loss`` for the hard term.

    ``divergence`` puts another in place of KL(p || q), p the teacher's and q the student's softmax at T (formulas:
    student_train.methods.divergences):

    - ``reverse_kl``: KL(q || p), word by word on the given text; the KL that Gu et al. 2024 (MiniLLM, arXiv 2306.08543) take over texts.
    - ``jsd``: ``beta`` KL(p || M) + (1 - ``beta``) KL(q || M), M the mixture with the share ``beta`` of p; unset .5
      (Agarwal et al. 2024, arXiv 2306.13649; also Wen et al. 2023, arXiv 2307.15190). 0 and 1 are KL(p || q) and KL(q || p).
    - ``skew_forward``, ``skew_reverse``: KL(p || ``alpha`` p + (1 - ``alpha``) q) and KL(q || (1 - ``alpha``) p + ``alpha`` q);
      unset .1 (DistiLLM, Ko et al. 2024, arXiv 2402.03898).
    - ``adaptive_kl``: KL(p || q) and KL(q || p), weighed by where p and q differ, in the teacher's likeliest words with the mass ``head``
      or in the others; unset .5 (AKL, Wu et al. 2024, arXiv 2404.02657).
    - ``total_variation``: half the sum of |p - q| (Wen et al. 2023, arXiv 2307.15190).
    - ``mse``: squared difference of centred logits, mean over words (Hinton et al. 2015, section 2.1).
    - ``raw_mse``: the same of the logits as they are, though a constant on all words changes no prediction (GLMD's ablation; TMKD).

    Factor for T: for large T, p - q shrinks as 1 / T, and total variation with it, so that is multiplied by T. All others but the two
    mse are quadratic in p - q where the two are near, as the KL is, and multiplied by T^2; so no gradient shrinks as T grows. For all
    but KL(p || q) these factors are ours. The mse have no T: ``mse`` is what twice T^2 KL comes to as T grows.

    ``top`` unset reads dense word logits, which a store derives from ``head_input``. ``top: K`` reads the teacher's K
    likeliest words with the mass of all others:

    - ``tail: ghost``: all other words are one ghost word on both sides, sum_K p log(p / q) + p_tail log(p_tail / q_tail).
      Head and tail mass are exact, the shape of the tail is free; a lower bound of the dense KL. At T = 1 only: the
      teacher's tail mass at another temperature does not follow from what is kept, so it is refused.
    - ``tail: none``: KL between the two distributions given that the word is one of the K; exact at every T, because
      softmax(log p / T) over kept words needs no others. The student's mass outside the K is not held back.

    ``bands: B`` with it reads the others' mass in B bands of ids (ours; store.codecs.topband), B ghost words in place of one:
    the shape of the tail is free within a band only. At T = 1 only.

    ``nucleus: P`` with it reads the fewest of the K words whose mass reaches P, ``least`` of them at least; the tail is exact likewise.

    ``skew_forward`` takes K words likewise, and as a ghost word's is a lower bound too. The other divergences look at every word that
    the student believes in, or at all, and are refused with ``top``.

    ``draws: N`` reads words drawn at random, by which KL(p || q) at T = 1 is learned without bias (Anshumann et al. 2025, arXiv
    2503.16870; student_train.methods.sampled_words): the mean gradient over draws is that of dense logits. ``tau`` is the power of the
    prediction that they are drawn from. With ``top: H`` (ours) the H likeliest words are exact and the N drawn from the others, with
    less variance for the same bytes. ``samples: D`` reads D independent sets and learns from set e mod D in epoch e, so that epochs do
    not use one sample again. Other divergences and temperatures take log p of more words than were drawn, and are refused.

    Word logits of many tokens are compared in chunks, which are computed again for the gradient, so that neither the student's nor the
    teacher's (where it is derived from ``head_input``) ever exist for all tokens; only a student under ZeRO-3 makes all of its own.

    Models of one tokenizer may be padded to vocabularies of different sizes: the words that both have are compared, the first ones. Of
    likeliest words those that the student lacks count as tail. With ``draws`` and ``bands`` other sizes are refused.

    GLMD (Tan et al. 2023, arXiv 2306.06625), L_sp: ``positions: all`` and ``temperature: 15``. Its code divides by all B S places of a
    batch padded to S tokens, padding and left-out tokens too, so that short rows count less: ``row_length: S`` does so, with S a
    number of the recipe, whatever the padding here. By default the mean is over the tokens.

    Term ``words``: sum over tokens.
    """

    paper = "Hinton, Vinyals, Dean 2015, arXiv 1503.02531"
    stages: ClassVar[Stages] = {"pretraining": ("soft",)}
    accepts = "any with the teacher's language-model head and vocabulary"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        positions: Literal["all", "labels", "masked"] = "labels",
        temperature: Temperature = 1.0,
        divergence: Name = "forward_kl",
        beta: Annotated[float, Field(ge=0, le=1)] | None = None,
        alpha: Annotated[float, Field(ge=0, lt=1)] | None = None,
        head: Annotated[float, Field(gt=0, lt=1)] | None = None,
        top: Annotated[int, Field(ge=1)] | None = None,
        nucleus: Annotated[float, Field(gt=0, lt=1)] | None = None,
        least: Annotated[int, Field(ge=1)] | None = None,
        bands: Annotated[int, Field(ge=1)] | None = None,
        draws: Annotated[int, Field(ge=1)] | None = None,
        tau: Annotated[float, Field(gt=0, le=10)] | None = None,
        samples: Annotated[int, Field(ge=1)] | None = None,
        tail: Literal["ghost", "none"] = "ghost",
        row_length: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        check_site("lm_logits", student, teacher)
        check_equal("heads", student.head, teacher.head)
        check_vocabularies(student, teacher)
        if top is not None and top > teacher.vocab:
            raise ValueError(f"top: the vocabulary has {teacher.vocab} words, found {top}")
        form = chosen_form(teacher.vocab, top, nucleus, least, bands, draws, tau, samples)
        if (draws is not None or bands is not None) and student.vocab != teacher.vocab:
            raise ValueError(
                f"expected equal vocabularies of student and teacher for the form {form}, found {student.vocab} and {teacher.vocab}; dense "
                "logits (leave top, draws and bands out) and likeliest words (top alone) serve models that are padded differently"
            )
        if draws is not None and (divergence != "forward_kl" or temperature != 1):
            found = f"divergence: {divergence}" if divergence != "forward_kl" else f"temperature: {temperature}"
            raise ValueError(
                f"{found} does not follow from words drawn at random ({form}): they stand for a prediction in a sum over it, forward_kl at "
                "temperature 1; leave draws out: dense lm_logits follow from head_input with its head, which a store keeps for them"
            )
        if (top is None or draws is not None or bands is not None) and tail != "ghost":
            raise ValueError("tail: says what becomes of words outside the top K; set top without draws and bands, or leave tail out")
        chosen, given = DIVERGENCES[divergence], {"beta": beta, "alpha": alpha, "head": head}
        for option, value in given.items():
            if value is not None and option != chosen.option:
                owners = " or ".join(name for name, entry in DIVERGENCES.items() if entry.option == option)
                raise ValueError(f"{option}: goes with divergence {owners}, found divergence: {divergence}; leave {option} out")
        if divergence in ("mse", "raw_mse") and temperature != 1:
            raise ValueError(f"temperature: the mse of logits has none, it compares them as they are, found {temperature}; leave it out")
        if top is not None and not chosen.top:
            raise ValueError(
                f"divergence: {divergence} needs what the teacher thinks of every word that the student may give mass to, also of those "
                f"outside its top {top}; leave top out: dense lm_logits follow from head_input with its head, which a store keeps for them"
            )
        if top is not None and tail == "ghost" and temperature != 1:
            raise ValueError(
                f"temperature: the mass of the tail is known at temperature 1 only, found {temperature}; "
                f"{'' if bands else 'set tail: none (kept words alone), or '}leave top out (dense logits)"
            )
        student_key = FeatureKey("lm_logits", positions=positions)
        teacher_key = FeatureKey("lm_logits", positions=positions, form="" if form is None else str(form))
        super().__init__({student_key}, {teacher_key})
        self.student_key, self.teacher_key = student_key, teacher_key
        self.positions, self.temperature, self.tail, self.form = positions, temperature, tail, form
        value = given.get(chosen.option)
        parameters = {chosen.option: chosen.usual if value is None else value} if chosen.option else {}
        self.divergence, self.power = partial(chosen.of, **parameters), chosen.power
        self.teacher_words = teacher.vocab
        self.plain, self.raw, self.row_length = divergence == "forward_kl", divergence == "raw_mse", row_length

    def counts(self, batch: Batch) -> Terms:
        if self.row_length is not None:
            return {"words": unit_count(batch, "row") * self.row_length}
        return {"words": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits, target = word_logits(student, self.student_key, batch), teacher[self.teacher_key]
        if isinstance(target, Drawn | TopDrawn):
            assert self.form is not None
            packed = packed_value(self.teacher_key, target, batch)
            assert isinstance(packed, Drawn | TopDrawn)
            drawn = estimate(packed, self.form, self.moment.epoch % self.form.samples)
            return {"words": each(lambda logits_MV, *of: estimated_kl(logits_MV, Estimate(*of)), logits, *drawn).sum()}
        if isinstance(target, TopBanded):
            banded = packed_value(self.teacher_key, target, batch)
            assert isinstance(banded, TopBanded)
            log_p_UE = torch.cat([banded.log_probs, log_masses(banded.bands)], -1)
            return {"words": each(partial(self._of_events, bands=banded.bands.shape[-1]), logits, banded.ids, log_p_UE).sum()}
        if not isinstance(target, TopK):
            return {"words": each(self._divergence, logits, word_logits(teacher, self.teacher_key, batch)).sum()}
        ids_UK = target.ids[batch.mask] if self.positions == "all" else target.ids
        log_p_UK, log_tail_U = (units(value, batch, self.positions) for value in (target.log_probs, target.log_tail))
        return {"words": each(self._of_likeliest, logits, ids_UK, log_p_UK, log_tail_U).sum()}

    def _divergence(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """[M] the divergence of two sides' logits, with its factor for T."""
        temperature, (student_MV, teacher_MV) = self.now(self.temperature), shared(student_MV, teacher_MV)
        if self.plain:
            return kl(student_MV, teacher_MV, temperature)
        if self.raw:
            return raw_mse(student_MV, teacher_MV)
        log_p_MV, log_q_MV = ((logits / temperature).log_softmax(-1) for logits in (teacher_MV, student_MV))
        return temperature**self.power * self.divergence(log_p_MV, log_q_MV)

    def _of_likeliest(self, logits_MV: Tensor, ids_MK: Tensor, log_p_MK: Tensor, log_tail_M: Tensor) -> Tensor:
        """[M] the divergence from likeliest words; those that the student lacks count as tail."""
        logits_MV = first_words(logits_MV, min(logits_MV.shape[-1], self.teacher_words))
        unused_MK = log_p_MK <= UNUSED
        if logits_MV.shape[-1] < self.teacher_words:
            lacking_MK = (ids_MK >= logits_MV.shape[-1]) & ~unused_MK
            log_lacking_M = log_p_MK.masked_fill(~lacking_MK, MASKED).logsumexp(-1)
            log_tail_M, unused_MK = torch.logaddexp(log_tail_M, log_lacking_M), unused_MK | lacking_MK
        # Places without a word repeat one that has: what they say of it is worth nothing.
        ids_MK = torch.where(unused_MK, ids_MK.gather(-1, unused_MK.int().argmin(-1, keepdim=True)), ids_MK).clamp(
            max=logits_MV.shape[-1] - 1
        )
        log_p_MK = log_p_MK.masked_fill(unused_MK, MASKED)
        if self.tail == "none" or ids_MK.shape[-1] == logits_MV.shape[-1]:  # a ghost of no words has no probability to compare
            return self._divergence(logits_MV.gather(-1, ids_MK).masked_fill(unused_MK, MASKED), log_p_MK)
        return self._of_events(logits_MV, ids_MK, torch.cat([log_p_MK, log_tail_M[:, None]], -1))

    def _of_events(self, logits_MV: Tensor, ids_MK: Tensor, log_p_ME: Tensor, bands: int = 1) -> Tensor:
        """[M] the divergence between words and groups of words, at temperature 1."""
        return self.divergence(log_p_ME, head_and_tail(logits_MV, ids_MK, bands))


def head_and_tail(logits_UV: Tensor, ids_UK: Tensor, bands: int = 1) -> Tensor:
    """[U, K + B] log-probabilities of the words ``ids_UK`` and, last, of the others in B = ``bands`` bands."""
    log_sum_U1 = logits_UV.logsumexp(-1, keepdim=True)
    # Summing the other words, instead of log(1 - sum of the K), keeps a small tail and its gradient exact.
    rest_UB = in_bands(logits_UV.scatter(-1, ids_UK, MASKED), bands)
    return torch.cat([logits_UV.gather(-1, ids_UK), rest_UB], -1) - log_sum_U1
