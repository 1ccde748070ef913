"""A sweep before it begins: everything that would only fail in the middle, in one message."""

from collections.abc import Sequence

import torch

from store.errors import MissingFeature, StoreError
from store.strict import did_you_mean
from student_train.needs import needs
from student_train.outline import Outline, score_names
from student_train.output import finished
from student_train.recipe import PhaseSpec
from student_train.run import check_features, check_options
from student_train.sweep import Sweep, Trial, combination


def check_sweep(sweep: Sweep, tried: Sequence[Trial]) -> None:
    """Refuse what would only fail in the middle, in one message for all trials; what stores lack as the lines of one dump recipe.

    Raises:
        ValueError: a recipe that doesn't fit its data or models, a metric that isn't measured, a trial begun with other options, a database
            that nothing names.
        StoreError: features that stores lack.
    """
    for device in sweep.devices:
        if device != "cpu" and int(device.removeprefix("cuda:")) >= torch.cuda.device_count():
            raise ValueError(f"devices: expected cpu or one of {torch.cuda.device_count()} GPUs that torch sees, found {device}")
    sweep.database()
    problems: dict[str, list[str]] = {}
    outlines: list[Outline] = []
    firsts = [trial for trial in tried if trial.seed == sweep.seeds[0]]
    for trial in firsts:
        try:
            _check_metric(trial.scored, sweep.metric)
            _check_pruner(sweep, trial.scored)
            outlines += check_options(trial.recipe, trial.recipe.phases)
        except (ValueError, StoreError) as error:
            problems.setdefault(str(error), []).append(combination(trial.parameters))
    if problems:
        raise ValueError("\n".join(f"{_several(where)}: {problem}" for problem, where in problems.items()))
    try:
        check_features(outlines)
    except MissingFeature as error:
        lines = needs([trial.recipe for trial in firsts])
        raise MissingFeature(f"{error}\n\nA dump with these lines serves all trials:\n{lines.rstrip()}") from None
    for trial in tried:
        for phase in trial.recipe.phases:
            finished(trial.recipe, phase)


def _check_metric(phase: PhaseSpec, metric: str) -> None:
    """Raise ValueError where ``phase`` doesn't measure it."""
    if not phase.evaluate:
        raise ValueError(f"metric: phase {phase.name!r} measures nothing: give it evaluate and metrics")
    known = [f"{prefix}{name}" for prefix in score_names(phase).values() for name in ("loss", *phase.metrics)]
    if metric.removeprefix("-") not in known:
        raise ValueError(f"metric: phase {phase.name!r} measures no {metric!r}{did_you_mean(metric.removeprefix('-'), known)}")


def _check_pruner(sweep: Sweep, phase: PhaseSpec) -> None:
    """Raise ValueError where there is a pruner and ``phase`` gives it nothing to look at."""
    if sweep.pruner is not None and phase.trainer.get("eval_strategy") in ("no", False):
        raise ValueError(f"pruner: phase {phase.name!r} measures nothing while it trains: leave out its eval_strategy, or the pruner")


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other combinations"
