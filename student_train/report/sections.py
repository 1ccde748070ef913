"""The sections of a report, in the order in which they stand in it."""

from collections.abc import Callable

from student_train.report.comparisons import comparisons
from student_train.report.course import course
from student_train.report.curves import curves, gradients
from student_train.report.disagreements import disagreements
from student_train.report.gkd_distances import gkd_distances
from student_train.report.gkd_stages import gkd_stages
from student_train.report.glmd_distances import glmd_distances
from student_train.report.glmd_words import glmd_words
from student_train.report.leaderboard import leaderboard
from student_train.report.runs import Runs
from student_train.report.section import Section

SECTIONS: tuple[Callable[[Runs], Section | None], ...] = (
    leaderboard,
    comparisons,
    curves,
    gradients,
    gkd_distances,
    gkd_stages,
    glmd_distances,
    glmd_words,
    course,
    disagreements,
)
"""Each gives None where the runs have nothing for it to show."""
