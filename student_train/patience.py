"""When a run has waited long enough for a better metric."""

from transformers import TrainerState


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations gave no better metric than the best."""
    if patience is None or state.best_global_step is None:
        return False
    evaluated = {entry["step"] for entry in state.log_history if any(name.startswith("eval_") for name in entry)}
    return sum(step > state.best_global_step for step in evaluated) >= patience
