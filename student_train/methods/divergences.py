"""Divergences between a teacher's and a student's next-word distributions, token by token, in log space.

``of_tokens`` takes logits, all others log-probabilities log_p (teacher) and log_q (student); a word that a side lacks is
``losses.MASKED`` there, far below any other and still finite. N tokens, V words.

Two conventions are about. GKD (Agarwal et al. 2024, arXiv 2306.13649) and TRL weigh the mixture M = beta p + (1 - beta) q, as here.
DistiLLM's code names the teacher's share of M otherwise: its lambda .9 is 1 - beta.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from online.words import Words, as_words, each
from student_train.methods.losses import kl

Divergence = Callable[[Tensor, Tensor], Tensor]
"""[N] numbers from log_p [N, V] and log_q [N, V]; differentiable in log_q."""


def of_tokens(divergence: Divergence, student: Words | Tensor, teacher: Words | Tensor, temperature: float = 1.0) -> Tensor:
    """[N] the divergence of softmax(teacher / T) and softmax(student / T), float32, without any factor for T.

    Logits are Words or tensors [N, V]. Where they are many, tokens are taken in chunks that are computed again in the backward
    pass: neither side's logits, where they are Words, nor what a divergence makes of them ever exist for all tokens.
    """

    def chunk(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
        student_nV, teacher_nV = shared(student_nV, teacher_nV)
        return divergence((teacher_nV.float() / temperature).log_softmax(-1), (student_nV.float() / temperature).log_softmax(-1))

    sides = (as_words(side) if isinstance(side, Tensor) else side for side in (student, teacher))
    return each(chunk, *sides)


def word_kl(student: Words, teacher: Words, temperature: float = 1.0) -> Tensor:
    """[N] T^2 KL(p || q) as ``losses.kl`` says, of word logits."""
    return each(lambda student_nV, teacher_nV: kl(*shared(student_nV, teacher_nV), temperature), student, teacher)


def shared(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to the words that they share, the first ones: models of one tokenizer may be padded to different vocabularies."""
    words = min(student_NV.shape[-1], teacher_NV.shape[-1])
    return first_words(student_NV, words), first_words(teacher_NV, words)


def first_words(logits_NV: Tensor, words: int) -> Tensor:
    """[N, words]; the tensor itself where it has no more, so that no gradient is copied."""
    return logits_NV if logits_NV.shape[-1] == words else logits_NV[:, :words]


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[...] KL(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[...] KL(q || p): the teacher's share of every word that the student believes in counts, so it takes dense logits."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """[...] beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q (GKD, section 2).

    It vanishes as beta goes to 0 or 1, like beta KL(p || q) and (1 - beta) KL(q || p); at 0 and 1 themselves it is KL(p || q) and
    KL(q || p), as in TRL, so there is a step in size.
    """
    if beta == 0:
        return forward_kl(log_p, log_q)
    if beta == 1:
        return reverse_kl(log_p, log_q)
    log_m = mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_forward(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """[...] KL(p || alpha p + (1 - alpha) q); alpha 0 is KL(p || q) (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    return forward_kl(log_p, mixture(log_p, log_q, alpha))


def skew_reverse(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """[...] KL(q || (1 - alpha) p + alpha q); alpha 0 is KL(q || p), and a word that the teacher lacks costs q log(1 / alpha) at most.

    Its gradient goes through the mixture too, as in DistiLLM's code; that of DistiLLM-2 detaches it there.
    """
    return forward_kl(log_q, mixture(log_p, log_q, 1 - alpha))


def adaptive_kl(log_p: Tensor, log_q: Tensor, head: float = 0.5) -> Tensor:
    """[...] KL(p || q) and KL(q || p), weighed by where the two differ (AKL, Wu et al. 2024, arXiv 2404.02657).

    The head are the teacher's likeliest words, those in front of which less than ``head`` of its mass lies; g_head and g_tail the sums of
    |p - q| in it and outside. KL(p || q), which minds the head, has the weight g_head / (g_head + g_tail). The weights carry no gradient.
    That the word which crosses ``head`` belongs to the head is unverified.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < head
        share = (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
    return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[...] half the sum of |p - q|."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def mse(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[...] squared difference of the logits, each side's own mean taken off, mean over words.

    Log-probabilities are logits but for a constant, which goes with the mean. Twice the limit of T^2 KL as T grows (Hinton et al.
    2015, arXiv 1503.02531, section 2.1).
    """
    difference = log_p - log_q
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """[...] log(share p + (1 - share) q)."""
    if share in (0, 1):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
