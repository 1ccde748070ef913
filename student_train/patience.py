"""Which weights of a run are its best, and when it has waited long enough for better ones."""

import math
from collections.abc import Mapping

from transformers import TrainerState

from store.strict import did_you_mean


def is_better(state: TrainerState, metrics: Mapping[str, float], best: str) -> bool:
    """Whether the metric ``best`` (a leading minus: lower is better) is better than ever before; ``state`` then remembers it, and the step.

    Never where it is NaN.

    Raises:
        ValueError: there is no such metric.
    """
    name, sign = best.removeprefix("-"), -1 if best.startswith("-") else 1
    if name not in metrics:
        raise ValueError(f"best: no metric {name!r}{did_you_mean(name, sorted(metrics))}")
    known = -math.inf if state.best_metric is None else sign * state.best_metric
    if not sign * metrics[name] > known:
        return False
    state.best_metric, state.best_global_step = metrics[name], state.global_step
    return True


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations gave no better metric than the best."""
    if patience is None or state.best_global_step is None:
        return False
    evaluated = {entry["step"] for entry in state.log_history if any(name.startswith("eval_") for name in entry)}
    return sum(step > state.best_global_step for step in evaluated) >= patience
