"""What methods share that learn from responses which the student writes itself.

Shapes: B rows, L new tokens at most.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from online.batch import Batch
from online.models import LoadedModel
from online.rollout import Writing, end_tokens, roll_out
from online.rows import pad_id
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import check_site
from student_train.moment import Moment

LOGITS = FeatureKey("lm_logits", positions="labels")


def check_writers(student: ModelShape, teacher: ModelShape) -> None:
    """Refuse two models that cannot both go on with a text.

    Their vocabularies may differ in size (of one tokenizer, padded differently): the words that both have are compared.
    """
    check_site("lm_logits", student, teacher)
    for side, shape in (("student", student), ("teacher", teacher)):
        if shape.head != "causal_lm":
            raise ValueError(f"responses are written word by word: expected a {side} with head causal_lm, found {shape.head}")


def only(teachers: Mapping[str, LoadedModel]) -> LoadedModel:
    """The one teacher that a method is attached to."""
    (teacher,) = teachers.values()
    return teacher


def padding(teacher: LoadedModel) -> int:
    """The id that fills rows."""
    return 0 if teacher.tokenizer is None else pad_id(teacher.tokenizer)


def written(batch: Batch, student: LoadedModel, teacher: LoadedModel, writing: Writing, moment: Moment) -> Batch:
    """``batch`` with responses of the student in place of its own; each follows from the run's seed, the step and the row alone."""
    return roll_out(student, batch, writing, _chances(batch, writing.max_new_tokens, moment), end_tokens(student, teacher))


def _chances(batch: Batch, words: int, moment: Moment) -> Tensor:
    """[B, L] float64 numbers in [0, 1)."""
    drawn = [moment.draws(f"response to row {row}", moment.step).random(words) for row in batch.rows.tolist()]
    return torch.from_numpy(np.stack(drawn)).to(batch.mask.device)
