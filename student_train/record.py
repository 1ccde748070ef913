"""ReCoRD's scores (Zhang et al. 2018, arXiv 1810.12885): of each query the entity with the best score is the answer.

It is compared with every right entity of the query, as SQuAD compares texts: in lower case, without punctuation, articles and runs of
white space. F1 and exact match are each the greatest over the right ones, and their mean over the queries.

Shapes: R rows (entities), C outputs of the task head.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from student_train.scores import Array

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """The words that count."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, right: str) -> float:
    """1 where the words that count are the same."""
    return float(normalised(answer) == normalised(right))


def token_f1(answer: str, right: str) -> float:
    """F1 of the words that count, each as often as it stands there."""
    found, expected = normalised(answer), normalised(right)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected)) if common else 0.0


SCORES: dict[str, Callable[[str, str], float]] = {"record_f1": token_f1, "record_em": exact_match}


def record_score(name: str, logits_RC: Array, labels_R: Array, groups_R: Array, entities: Sequence[str]) -> float:
    """Mean over queries of SCORES[name]; of two outputs an entity's score is logit 1 - logit 0, the first of equal ones is taken.

    Raises:
        ValueError: a query without a right entity.
    """
    scores_R = logits_RC[:, 0] if logits_RC.shape[1] == 1 else logits_RC[:, 1] - logits_RC[:, 0]
    of_queries = []
    for group in np.unique(groups_R):
        rows = np.flatnonzero(groups_R == group).tolist()
        right = [entities[row] for row in rows if labels_R[row] == 1]
        if not right:
            raise ValueError(f"ReCoRD: none of the entities of a query is right; its entities are {[entities[row] for row in rows][:5]}")
        answer = entities[rows[int(scores_R[rows].argmax())]]
        of_queries.append(max(SCORES[name](answer, one) for one in right))
    return float(np.mean(of_queries))
