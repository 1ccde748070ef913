"""The leaderboard: combinations by their mean score over seeds, with sizes and cost."""

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from online.figures import duration, size
from student_train.report.answers import read_answers, row_values
from student_train.report.colours import INK, MUTED, series
from student_train.report.combinations import Combination, best_of_methods, combinations, hyperparameters, spread
from student_train.report.drawing import panels
from student_train.report.runs import Run, Runs
from student_train.report.section import Picture, Section, Table
from student_train.weights import count_weights, weight_bytes

_FURTHER = 4
"""Other scores than the ranking one that have a column."""
_ALWAYS = ("method", "hyperparameters", "seeds")
"""Columns that stand there also where they are empty."""


def leaderboard(runs: Runs) -> Section:
    """The best combination of each method, all combinations, and what is not finished."""
    ranked = combinations(runs)
    best = best_of_methods(runs)
    finished = [one for one in ranked if one.mean is not None]
    unfinished = [run for run in runs.all if run.state != "finished"]
    way = "lower is better" if runs.lower else "higher is better"
    text = [
        f"{len(runs.finished)} of {len(runs.all)} runs are finished: {len(finished)} combinations of {len(best)} methods. Score: held-out "
        f"{runs.metric} ({way}), mean ± sample standard deviation over seeds."
    ]
    if (teacher := _teacher(best, runs.metric)) is not None:
        text.append(f"The teacher's {runs.metric} on the rows of {best[0].method} is {teacher:.4f}.")
    if len({_measured_on(run) for run in runs.finished}) > 1:
        text.append("Not all runs were measured on the same rows: compare those that were.")
    tables = []
    if best:
        chosen = "The best combination of a method was chosen by the same held-out rows that are shown, so its score flatters it a little."
        tables.append(_table("Best of each method", best, runs, f"{chosen} {_starts(runs.finished)}"))
    if len(finished) > len(best):
        tables.append(_table("All combinations", finished, runs, "", folded=True))
    if unfinished:
        tables.append(_unfinished(unfinished))
    pictures = (_picture(best, runs),) if len(best) > 1 else ()
    return Section("Leaderboard", tuple(text), tuple(tables), pictures)


def _table(name: str, ranked: Sequence[Combination], runs: Runs, note: str, *, folded: bool = False) -> Table:
    further = _further(ranked, runs.metric)
    lines = [_line(one, runs.metric, further) for one in ranked]
    header = [column for column in lines[0] if column in _ALWAYS or any(line[column] for line in lines)]
    return Table(name, tuple(header), tuple(tuple(line[column] for column in header) for line in lines), note, folded)


def _line(one: Combination, metric: str, further: Sequence[str]) -> dict[str, str]:
    """Column -> cell; empty where nothing is known."""
    phases = [run.phase for run in one.finished if run.phase is not None]
    before = _mean([None if phase.before is None else phase.before.get(metric) for phase in phases])
    weights, of_files = max(count_weights(phase.student) for phase in phases), max(weight_bytes(phase.student) for phase in phases)
    seconds = _mean([_cost(run, "seconds") or run.seconds for run in one.finished])
    memory = _mean([_cost(run, "gpu_memory") or _cost(run, "memory") for run in one.finished])
    read = _mean([_cost(run, "feature_bytes") for run in one.finished])
    speed = _mean([_speed(run) for run in one.finished])
    starts = {start for run in one.finished if (start := _start(run))}
    others = {score: _mean([phase.after.get(score) for phase in phases]) for score in further}
    return {
        "method": one.method,
        "hyperparameters": hyperparameters(one),
        metric: spread(one.mean, one.std),
        "seeds": f"{len(one.scores)} of {len(one.runs)}",
        **{score: "" if value is None else f"{value:.4f}" for score, value in others.items()},
        "untrained": "" if before is None else f"{before:.4f}",
        "parameters": f"{weights:,}" if weights else "",
        "weights": size(of_files) if of_files else "",
        "time": duration(seconds) if seconds else "",
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "memory": size(memory) if memory else "",
        "read / row": "" if read is None else size(read),
        "start": starts.pop()[:8] if len(starts) == 1 else f"{len(starts)} starts" if starts else "",
    }


def _further(ranked: Sequence[Combination], metric: str) -> list[str]:
    """Other scores that all have, and that are no loss terms."""
    found = [set(run.phase.after) for one in ranked for run in one.finished if run.phase is not None]
    named = next((list(run.phase.after) for one in ranked for run in one.finished if run.phase is not None), [])
    return [score for score in named if score not in (metric, "loss") and "/" not in score and all(score in one for one in found)][
        :_FURTHER
    ]


def _unfinished(left: Sequence[Run]) -> Table:
    lines = []
    for run in left:
        steps = max((int(log["step"]) for phase in run.phases for log in phase.logs), default=0)
        said = run.error.splitlines()[0] if run.error else f"{steps} steps done" if steps else ""
        lines.append((run.method, hyperparameters(Combination(run.method, run.parameters, (run,), "")), str(run.seed), run.state, said))
    return Table("Not finished", ("method", "hyperparameters", "seed", "state", ""), tuple(lines), folded=len(lines) > 6)


def _picture(best: Sequence[Combination], runs: Runs) -> Picture:
    figure, (axes,) = panels(1, 1, 0.9 + 0.32 * len(best))
    for place, one in enumerate(best):
        scores, mean = list(one.scores.values()), fmean(one.scores.values())
        axes.plot(scores, [place] * len(scores), "o", color=series(0), markersize=5, alpha=0.55, markeredgewidth=0)
        axes.plot([mean, mean], [place - 0.28, place + 0.28], "-", color=INK.light, linewidth=2)
        if one.std is not None:
            axes.plot([mean - one.std, mean + one.std], [place, place], "-", color=MUTED.light, linewidth=1)
    axes.set_yticks(range(len(best)), [one.method for one in best])
    axes.set_ylim(len(best) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(runs.metric)
    said = "The best combination of each method: a dot for each seed, a bar at their mean, a line one standard deviation either way."
    return Picture("leaderboard", said, figure)


def _starts(finished: Sequence[Run]) -> str:
    """Whether students of one seed began with the same weights."""
    of_seed: dict[int, set[str]] = {}
    for run in finished:
        if start := _start(run):
            of_seed.setdefault(run.seed, set()).add(start)
    if not of_seed:
        return ""
    if all(len(starts) == 1 for starts in of_seed.values()):
        return "All students of one seed began with the same weights."
    return "Students of one seed began with different weights: compare with care."


def _teacher(best: Sequence[Combination], metric: str) -> float | None:
    """The teacher's own score on the best student's held-out rows; None where its answers were not kept, or the score compares with it."""
    if not best or metric in ("agreement", "task_kl") or (phase := best[0].finished[0].phase) is None:
        return None
    answers = read_answers(phase)
    if len(answers) != 1 or answers[0].teacher is None:
        return None
    values = row_values(replace(answers[0], student=answers[0].teacher), metric)
    return None if values is None else float(values.mean())


def _measured_on(run: Run) -> str:
    """Which held-out rows its score is of, as its recipe names them."""
    spec = {} if run.phase is None else run.phase.spec
    chosen = [[data.get(key) for key in ("store", "split", "where")] for data in spec.get("evaluate", ())]
    return json.dumps([chosen, spec.get("evaluate_rows")], default=str)


def _start(run: Run) -> str | None:
    """Hash of the weights that its first phase began with."""
    result = run.phases[0].result if run.phases else None
    return None if result is None else result.get("start")


def _cost(run: Run, name: str) -> float | None:
    """A figure of student_train.cost.Cost of the phase that is scored; None where it isn't known."""
    result = None if run.phase is None else run.phase.result
    return None if result is None else result.get("cost", {}).get(name)


def _speed(run: Run) -> float | None:
    return None if run.phase is None else _mean([log.get("tokens_per_second") for log in run.phase.logs])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
