"""The sections of a report, in the order in which they stand in it."""

from collections.abc import Callable

from student_train.report.comparisons import comparisons
from student_train.report.curves import curves, gradients
from student_train.report.disagreements import disagreements
from student_train.report.leaderboard import leaderboard
from student_train.report.runs import Runs
from student_train.report.section import Section

SECTIONS: tuple[Callable[[Runs], Section | None], ...] = (leaderboard, comparisons, curves, gradients, disagreements)
"""Each gives None where the runs have nothing for it to show."""
