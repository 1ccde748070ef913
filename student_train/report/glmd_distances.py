"""GLMD 2 and 3: which distances between inner layers follow L_sp, the loss on word predictions, in training.

Named after figures 2 and 3 of Tan et al., "Are Intermediate Layers and Labels Really Necessary?" (Findings of ACL 2023, arXiv 2306.06625),
whose claim is that L_sp pulls inner layers along by itself. What stands on the axes is ours, as in student_train.report.gkd_distances.
"""

from collections.abc import Sequence

from student_train.report.checkpoints import Checkpoints, Distance, probed
from student_train.report.correlation import FEWEST
from student_train.report.gkd_distances import ROWS, SOFT, Target, axes_of, by_method, by_phase, checkpoints, counted, lacking, maps
from student_train.report.runs import Runs
from student_train.report.section import Picture, Section

WORDS = "l_sp"
OTHERS = tuple(kind for kind in SOFT if kind != WORDS)


def glmd_distances(runs: Runs) -> Section | None:
    """The section; None where no probe looked at L_sp and at another distance."""
    found = [one for one in probed(runs) if _word_loss(one) is not None and axes_of([one], (*ROWS, *OTHERS))[0]]
    if not found:
        return None
    text = (
        "Spearman coefficients between the distances of inner layers and L_sp (Kullback-Leibler divergence of the predictions of all words "
        "at all tokens) over the checkpoints of a run; of several runs, the mean of their coefficients. Near 1: the layer comes closer to "
        "the teacher's as its word predictions do, whether it was trained to or not.",
        *lacking(found),
    )
    enough = [one for one in found if checkpoints(one) >= FEWEST]
    pictures = [picture for suffix, of_phase in by_phase(enough) for picture in _pictures(of_phase, suffix)]
    return Section("GLMD 2 and 3: inner layers and L_sp", text, pictures=tuple(pictures))


def _word_loss(one: Checkpoints) -> Distance | None:
    """L_sp as it was probed, at its highest temperature."""
    probes = [distance for distance in one.distances if distance.distance == WORDS]
    return max(probes, key=lambda distance: distance.temperature or 0.0, default=None)


def _target(one: Checkpoints) -> Target:
    distance = _word_loss(one)
    assert distance is not None
    temperature = "" if distance.temperature is None else f", T={distance.temperature:g}"
    return Target(f"L_sp{temperature}", lambda other: other.distances.get(distance, {}))


def _pictures(found: Sequence[Checkpoints], suffix: str) -> list[Picture]:
    target = _target(found[0])
    count = f"phase {found[0].phase.name}, {counted(found)} of {', '.join(dict.fromkeys(one.run.method for one in found))}"
    pictures = [
        Picture(
            f"glmd-2{suffix}",
            f"Spearman coefficients of distances with {target.name}, layer by layer: {count}.",
            maps("Spearman", found, [target], (ROWS, OTHERS)),
        )
    ]
    if len({one.run.method for one in found}) > 1:
        caption = "The same method by method: the mean over runs, layers and temperatures of a kind of distance."
        pictures.append(Picture(f"glmd-3{suffix}", caption, by_method(found, [target], (*ROWS, *OTHERS))))
    return pictures
