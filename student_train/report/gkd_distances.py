"""GKD 4 and 5: which distances between teacher and student go together with the loss, and with what held-out rows score.

Named after figures 4 and 5 of Tan, Tam, Wang, Gong, Zhao, Zhang, Tang, "GKD: A General Knowledge Distillation Framework for Large-scale
Pre-trained Language Model" (arXiv 2306.06629). What stands on the axes is ours: rows are kinds of distance, columns the student's layers or
temperatures, cells the coefficient over the checkpoints of a run (student_train.report.correlation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from student_train.report.checkpoints import Checkpoints, Distance, Series, paired, probed
from student_train.report.correlation import COEFFICIENTS, FEWEST, by_chance, coefficient, mean_coefficient
from student_train.report.drawing import WIDTH
from student_train.report.heat_map import ROW, Cells, draw, printed
from student_train.report.runs import Runs
from student_train.report.section import Picture, Section, Table

KINDS = ("embedding", "hidden", "attention", "attention_probs", "query", "key", "value")
ROWS = (*KINDS, *(f"{kind}_relation" for kind in KINDS))
"""Of the upper panels, from top to bottom: plain distances, then pair-wise scaled ones."""
SOFT = ("soft", "words", "l_sp")
"""Of the lower panels: soft labels' divergences, a column for each temperature."""
LABELS = {
    "attention_probs": "attention (probs)",
    "soft": "soft labels, KL",
    "words": "word predictions, KL",
    "l_sp": "word predictions, L_sp",
}


@dataclass(frozen=True)
class Target:
    """What distances are held against."""

    name: str
    of: Callable[[Checkpoints], Series]


def gkd_distances(runs: Runs) -> Section | None:
    """The section; None where no phase has a probe."""
    found = probed(runs)
    if not found:
        return None
    enough = [one for one in found if checkpoints(one) >= FEWEST]
    text = [
        "Spearman and Pearson coefficients between each distance of teacher and student and the training loss (left) or a held-out score "
        "(right), over the checkpoints of a run; of several runs, the mean of their coefficients. +1: they fall and rise together; "
        "with a score of which more is better, -1 says the same. What a distance was not trained on can follow all the same.",
        *_caution(enough),
        *lacking(found),
    ]
    pictures, tables = [], []
    for suffix, of_phase in by_phase(enough):
        text += _unmet(of_phase, runs)
        pictures += _pictures(of_phase, runs, suffix)
        tables.append(_table(of_phase, runs))
    return Section("GKD 4 and 5: distances, loss and score", tuple(text), tuple(tables), tuple(pictures))


def coefficients(runs: Runs) -> list[dict[str, object]]:
    """Those of every distance of every probed phase with both targets, one by one, as the table ``correlations`` has them."""
    return [
        {
            "run": one.run.name,
            "phase": one.phase.name,
            "distance": distance.name,
            "with": target.name,
            "checkpoints": len(paired(series, target.of(one))[0]),
            **{name.lower(): coefficient(name, series, target.of(one)) for name in COEFFICIENTS},
        }
        for one in probed(runs)
        for target in targets(one, runs)
        if target is not None
        for distance, series in one.distances.items()
    ]


def by_phase(found: Sequence[Checkpoints]) -> list[tuple[str, list[Checkpoints]]]:
    """Those of each phase, for they have losses of their own, and what their pictures' names end in; nothing where there is one phase."""
    phases = list(dict.fromkeys(one.phase.name for one in found))
    suffixes = [""] if len(phases) == 1 else [f"-{number}" for number in range(1, len(phases) + 1)]
    return [(suffix, [one for one in found if one.phase.name == phase]) for suffix, phase in zip(suffixes, phases, strict=True)]


def checkpoints(one: Checkpoints) -> int:
    """The steps at which distances were taken."""
    return len({step for series in one.distances.values() for step in series})


def _caution(found: Sequence[Checkpoints]) -> list[str]:
    """How far a coefficient can be trusted."""
    if not found:
        return []
    least = min(checkpoints(one) for one in found)
    return [
        f"Over {least} checkpoints, one of 20 coefficients of values that have nothing to do with each other is beyond "
        f"±{by_chance(least):.2f}; and all that falls as training goes on goes together, whatever causes what."
    ]


def lacking(found: Sequence[Checkpoints]) -> list[str]:
    """A sentence on runs with too few checkpoints, if there are any."""
    few = {f"{one.run.name} ({one.phase.name})": checkpoints(one) for one in found if checkpoints(one) < FEWEST}
    if not few:
        return []
    shown = ", ".join(f"{name}: {count}" for name, count in list(few.items())[:5]) + (", ..." if len(few) > 5 else "")
    return [
        f"A coefficient needs {FEWEST} checkpoints, and {len(few)} of {len(found)} probed phases have fewer ({shown}): evaluate more often "
        "(trainer.eval_steps), or let the probe look at more steps (probe.every)."
    ]


def _unmet(found: Sequence[Checkpoints], runs: Runs) -> list[str]:
    """A sentence on each target that was measured at too few of the probed steps."""
    return [
        f"No map for the {target.name} of phase {found[0].phase.name}: it was measured at {met(found, target)} of the probed steps, and a "
        f"coefficient needs {FEWEST}. Let the probe look at more steps (probe.every)."
        for target in targets(found[0], runs)
        if target is not None and met(found, target) < FEWEST
    ]


def targets(one: Checkpoints, runs: Runs) -> tuple[Target, Target | None]:
    """The training loss, and the held-out score that ``one`` has."""
    score = one.held_out(runs.metric)
    of_score = None if score is None else Target(f"held-out {score}", lambda other: other.scores.get(score, {}))
    return Target("training loss", lambda other: other.loss), of_score


def label(distance: str) -> str:
    """As a row of a map."""
    plain = distance.removesuffix("_relation")
    return LABELS.get(plain, plain) + (", pair-wise" if plain != distance else "")


def place(distance: Distance) -> str:
    """As a column of a map: the student's layer and the teacher's, or the temperature."""
    if distance.temperature is not None:
        return f"T={distance.temperature:g}"
    if distance.student_layer is None:
        return "0"
    return f"{distance.student_layer}" if distance.teacher_layer is None else f"{distance.student_layer}·{distance.teacher_layer}"


def cells(name: str, found: Sequence[Checkpoints], target: Target, kinds: Sequence[str]) -> Cells:
    """The mean coefficient over runs of each distance of these ``kinds``."""
    distances = dict.fromkeys(distance for one in found for distance in one.distances if distance.distance in kinds)
    return {
        (label(distance.distance), place(distance)): mean_coefficient(
            name, [(one.distances.get(distance, {}), target.of(one)) for one in found]
        )
        for distance in distances
    }


def axes_of(found: Sequence[Checkpoints], kinds: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rows and columns of a map of what was probed of ``kinds``: kinds in their order, layers and temperatures from low to high."""
    distances = {distance for one in found for distance in one.distances if distance.distance in kinds}
    in_order = sorted(distances, key=lambda one: (one.student_layer or 0, one.teacher_layer or 0, one.temperature or 0.0))
    rows = [label(kind) for kind in kinds if any(one.distance == kind for one in distances)]
    return rows, list(dict.fromkeys(place(one) for one in in_order))


def maps(name: str, found: Sequence[Checkpoints], against: Sequence[Target], kinds_of_panels: Sequence[Sequence[str]]) -> Figure:
    """A panel for each target (columns) and each of ``kinds_of_panels`` (rows; those without a distance are left out)."""
    grids = [(kinds, *axes_of(found, kinds)) for kinds in kinds_of_panels]
    grids = [grid for grid in grids if grid[1]]
    heights = [len(rows) * ROW for _, rows, _ in grids]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6 * len(grids) + 0.1), layout="constrained")
    panels = figure.subplots(len(grids), len(against), squeeze=False, height_ratios=heights)
    for number, (kinds, rows, columns) in enumerate(grids):
        for panel, target in zip(panels[number], against, strict=True):
            mesh = draw(panel, cells(name, found, target, kinds), rows, columns, f"{name}, {target.name}" if number == 0 else "")
            panel.tick_params(labelleft=panel is panels[number][0])
            if not set(kinds) <= set(SOFT):
                panel.set_xlabel("layer: student·teacher (0: embedding)")
    figure.colorbar(mesh, ax=list(panels[:, -1]), shrink=min(1.0, 1.6 / figure.get_figheight()), ticks=[-1, 0, 1]).outline.set_visible(
        False
    )
    return figure


def met(found: Sequence[Checkpoints], target: Target) -> int:
    """At how many steps a probe looked and ``target`` was measured, at most of all runs."""
    return max(len(paired(series, target.of(one))[0]) for one in found for series in one.distances.values())


def _pictures(found: Sequence[Checkpoints], runs: Runs, suffix: str) -> list[Picture]:
    against = [target for target in targets(found[0], runs) if target is not None and met(found, target) >= FEWEST]
    if not against:
        return []
    count = f"phase {found[0].phase.name}, {counted(found)}, {_range([checkpoints(one) for one in found])} checkpoints each"
    pictures = [
        Picture(
            f"gkd-{number}{suffix}",
            f"{name} coefficients of distances with {' and '.join(target.name for target in against)}: {count}. "
            "A dash: it never changed. Pair-wise: between the relations of all pairs of tokens, scaled.",
            maps(name, found, against, (ROWS, SOFT)),
        )
        for number, name in zip((4, 5), COEFFICIENTS, strict=True)
    ]
    methods = list(dict.fromkeys(one.run.method for one in found))
    if len(methods) > 1:
        pictures.append(
            Picture(
                f"gkd-4-methods{suffix}",
                f"Spearman coefficients method by method, phase {found[0].phase.name}: the mean over runs, layers and temperatures of a "
                "kind of distance.",
                by_method(found, against, (*ROWS, *SOFT)),
            )
        )
    return pictures


def by_method(found: Sequence[Checkpoints], against: Sequence[Target], among: Sequence[str]) -> Figure:
    """Spearman's coefficients with a column for each method, the mean over layers and temperatures of each kind of distance ``among``."""
    methods = list(dict.fromkeys(one.run.method for one in found))
    kinds = [kind for kind in among if any(distance.distance == kind for one in found for distance in one.distances)]
    figure = Figure(figsize=(WIDTH, len(kinds) * ROW + 1.2), layout="constrained")
    panels = figure.subplots(1, len(against), squeeze=False)[0]
    for panel, target in zip(panels, against, strict=True):
        means: dict[tuple[str, str], float | None] = {}
        for method in methods:
            of_method = [one for one in found if one.run.method == method]
            for kind in kinds:
                pairs = [
                    (series, target.of(one)) for one in of_method for distance, series in one.distances.items() if distance.distance == kind
                ]
                if pairs:
                    means[label(kind), method] = mean_coefficient("Spearman", pairs)
        draw(panel, means, [label(kind) for kind in kinds], methods, f"Spearman, {target.name}")
        for name in panel.get_xticklabels() if len(methods) > 4 else ():
            name.set(rotation=40, ha="right", rotation_mode="anchor")
        panel.tick_params(labelleft=panel is panels[0])
    return figure


def _table(found: Sequence[Checkpoints], runs: Runs) -> Table:
    """Every coefficient, with its range over runs, and that of all checkpoints of all runs as one sample."""
    distances = dict.fromkeys(distance for one in found for distance in one.distances)
    rows = []
    for target in targets(found[0], runs):
        for distance in distances if target is not None else ():
            assert target is not None
            pairs = [(one.distances.get(distance, {}), target.of(one)) for one in found]
            line = [distance.name, target.name]
            for name in COEFFICIENTS:
                within = [value for one, other in pairs if (value := coefficient(name, one, other)) is not None]
                line += [
                    printed(sum(within) / len(within) if within else None),
                    f"{printed(min(within))} to {printed(max(within))}" if within else "–",
                ]
            line.append(printed(coefficient("Spearman", *pooled(pairs))))
            rows.append((*line, str(len(pairs))))
    header = ("distance", "with", "Spearman", "over runs", "Pearson", "over runs", "Spearman, pooled", "runs")
    note = (
        "Pooled: all checkpoints of all runs as one sample, so differences between runs count too; losses of different methods have "
        "different scales, so pooled coefficients with the training loss mix those in."
    )
    return Table(f"Coefficients of phase {found[0].phase.name}", header, tuple(rows), note, folded=True)


def pooled(pairs: Sequence[tuple[Series, Series]]) -> tuple[Series, Series]:
    """All runs' checkpoints as those of one: two series over a running number."""
    ones, others = [], []
    for pair in pairs:
        one, other = paired(*pair)
        ones += one
        others += other
    return dict(enumerate(ones)), dict(enumerate(others))


def counted(found: Sequence[Checkpoints]) -> str:
    """``1 run``, ``6 runs``."""
    return f"{len(found)} run{'s' if len(found) > 1 else ''}"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
