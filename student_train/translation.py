"""Rows and teachers' answers as a student sees them that keeps only some words: in its own order of words.

Nothing else of a step knows of it: the student takes ids of the whole vocabulary (online.kept_words), its teacher reads the same rows,
and methods and metrics compare word logits and labels that are in one order.

Shapes: U tokens, V words, K kept words.
"""

from dataclasses import replace

from torch import Tensor

from online.batch import Batch, Features, Value
from online.kept_words import KeptWords, kept_words
from online.models import LM_HEADS, LoadedModel
from online.words import Words
from store.features import FeatureKey


def translated(student: LoadedModel, batch: Batch, answers: Features) -> tuple[Batch, Features]:
    """``batch`` with the words of its labels, and ``answers`` with their word logits, in the order of ``student``'s words.

    A label becomes the word that stands for it. Of a teacher's logits those of the kept words are taken before any softmax, so that its
    distribution is the one given that a kept word comes: what it thinks of dropped words is left out, not moved (GLMD's code).
    """
    words = kept_words(student.model)
    if words is None:
        return batch, answers
    return _labelled(batch, words, student), {key: _gathered(key, value, words.kept) for key, value in answers.items()}


def _labelled(batch: Batch, words: KeptWords, student: LoadedModel) -> Batch:
    if student.shape.head not in LM_HEADS or batch.token_labels is None:
        return batch  # token labels of other heads are classes
    verbalisers = None if batch.verbalisers is None else words.labels(batch.verbalisers)
    seen = replace(batch, token_labels=words.labels(batch.token_labels), verbalisers=verbalisers)
    vars(seen).update({name: vars(batch)[name] for name in ("real", "padding", "scored", "padded_behind") if name in vars(batch)})
    return seen


def _gathered(key: FeatureKey, value: Value, kept: Tensor) -> Value:
    if key.site != "lm_logits":
        return value
    if isinstance(value, Words):
        return value.among(kept)
    assert isinstance(value, Tensor), f"{key}: outlines refuse forms of words here"
    return value[..., kept]
