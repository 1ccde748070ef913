"""Learning from words that were drawn at random from a teacher's predictions, beside its likeliest ones or alone.

Shapes: U tokens, V words, P places of drawn and likeliest words.
"""

from torch import Tensor

from online.estimates import Estimate
from store.forms import WordForm


def estimated_kl(logits_UV: Tensor, target: Estimate) -> Tensor:
    """[U] sum over words of t^ (log t^ - log q), q the student's softmax over all words.

    Its gradient in the logits, q sum(t^) - t^, is on average that of KL(t || q). Its value is above that on average, by what drawing takes
    from t's entropy, which no student changes.
    """
    log_q_UP = logits_UV.gather(-1, target.ids) - logits_UV.logsumexp(-1, keepdim=True)
    return (target.weights * (target.logs - log_q_UP)).sum(-1)


def chosen_form(
    words: int,
    top: int | None,
    nucleus: float | None,
    least: int | None,
    bands: int | None,
    draws: int | None,
    tau: float | None,
    samples: int | None,
) -> WordForm | None:
    """The form that ``lm_kd``'s options name, of a vocabulary of so many words; None for dense logits.

    Raises:
        ValueError: they contradict each other; says which serve.
    """
    if top is None and draws is None:
        for option, value in {"nucleus": nucleus, "least": least, "bands": bands, "tau": tau, "samples": samples}.items():
            if value is not None:
                needed = "top (words at most)" if option in ("nucleus", "least", "bands") else "draws (words of a set)"
                raise ValueError(f"{option}: goes with {needed}; set it, or leave {option} out (dense logits)")
        return None
    if draws is None and (tau is not None or samples is not None):
        raise ValueError("tau, samples: go with draws, words drawn at random; set it, or leave both out (the likeliest words)")
    if draws is not None and nucleus is not None:
        raise ValueError("nucleus: goes with top alone; with draws the mass of the others is drawn from, whatever it is; leave one out")
    if least is not None and nucleus is None:
        raise ValueError("least: says how many words a nucleus has at least; set nucleus, or leave it out")
    if bands is not None and (draws is not None or nucleus is not None):
        raise ValueError("bands: they hold all of the mass that the likeliest words leave; leave draws and nucleus out, or bands")
    form = WordForm(
        top or 0, 1.0 if nucleus is None else nucleus, least or 1, draws or 0, 1.0 if tau is None else tau, samples or 1, bands or 0
    )
    form.check(words)
    return form
