"""GLMD 5: the long tail of rare words, and how much of a corpus the words that students keep cover.

Named after figure 5 of Tan et al. (Findings of ACL 2023, arXiv 2306.06625), which motivates vocabulary compression
(student_train.vocabulary). What stands on the axes is ours. Ranks count words from the most frequent one.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from student_train.report.colours import MUTED, series
from student_train.report.drawing import panels
from student_train.report.runs import Runs
from student_train.report.section import Picture, Section, Table
from student_train.report.word_counts import ROWS, WordCounts, word_counts

POINTS = 150
"""Of a curve; ranks that lie evenly on a logarithmic axis."""
PICTURES = 4
RANKS = (100, 1_000, 5_000, 10_000, 15_000)
"""How much so many words cover, in the table."""
RARE = 5
HEIGHT = 2.6


def glmd_words(runs: Runs) -> Section | None:
    """The section; None where no phase has a student yet."""
    found, failed = word_counts(runs)
    if not found and not failed:
        return None
    text = [
        f"Token frequencies by rank in the rows that students learn from (the first {ROWS:,} rows of a store; special tokens included, "
        "masked words as what they were), and the share of all tokens that the most frequent words cover.",
        *failed,
    ]
    pictures = tuple(
        Picture(f"glmd-5-{number}" if len(found) > 1 else "glmd-5", _caption(one), _draw(one))
        for number, one in enumerate(found[:PICTURES], 1)
    )
    return Section("GLMD 5: the tail of rare words", tuple(text), (_table(found),) if found else (), pictures)


def _caption(one: WordCounts) -> str:
    tokens, occurring = int(one.counts.sum()), int((one.counts > 0).sum())
    said = f"{one.rows}: {tokens:,} tokens, {occurring:,} of {len(one.counts):,} words occur. "
    if one.kept is None:
        return said + "Students keep all words."
    return said + f"The {len(one.kept):,} kept words cover {one.covered:.2%} of the tokens."


def _draw(one: WordCounts) -> Figure:
    """Left: how often each word comes; right: the share of tokens that words up to a rank cover."""
    order_V = np.argsort(-one.counts, kind="stable")
    counts_V = one.counts[order_V]
    is_kept_V = np.ones(len(counts_V), np.bool_) if one.kept is None else np.isin(order_V, one.kept)
    figure, (left, right) = panels(1, 2, HEIGHT)
    ranks_V = np.arange(1, len(counts_V) + 1)
    _points(left, ranks_V[is_kept_V & (counts_V > 0)], counts_V[is_kept_V & (counts_V > 0)], 0, "kept" if one.kept is not None else "")
    if one.kept is not None:
        _points(left, ranks_V[~is_kept_V & (counts_V > 0)], counts_V[~is_kept_V & (counts_V > 0)], 1, "dropped")
        left.legend()
    left.set(xscale="log", yscale="log", xlabel="rank", ylabel="occurrences", title="Token frequencies")
    _points(right, ranks_V, coverage(one.counts), 0, "")
    right.set(xscale="log", xlabel="rank", ylabel="share of tokens", title="Covered by the words up to a rank", ylim=(0, 1.02))
    if one.kept is not None:
        right.axvline(len(one.kept), color=MUTED.light, linestyle=":", linewidth=1)
        right.annotate(
            f"{len(one.kept):,} kept words: {one.covered:.1%}", (len(one.kept), 0.08), (-4, 0),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    for axis in (left, right):
        axis.minorticks_off()
    return figure


def coverage(counts_V: NDArray[np.int64]) -> NDArray[np.float64]:
    """[V] share of the tokens that the most frequent 1, 2, ... V words are."""
    summed: NDArray[np.float64] = np.cumsum(np.sort(counts_V)[::-1]) / counts_V.sum()
    return summed


def _points(axes: Axes, ranks: NDArray[np.int64], values: NDArray[np.int64] | NDArray[np.float64], number: int, label: str) -> None:
    """A curve over ranks, thinned on the logarithmic axis; both ends stay."""
    if len(ranks):
        chosen = np.unique(np.geomspace(1, len(ranks), POINTS).astype(np.int64)) - 1
        axes.plot(ranks[chosen], values[chosen], color=series(number), label=label, marker="." if len(ranks) == 1 else "")


def _table(found: Sequence[WordCounts]) -> Table:
    rows = []
    for one in found:
        covered = coverage(one.counts)
        shares = [f"{covered[rank - 1]:.1%}" if rank <= len(covered) else "" for rank in RANKS]
        kept = "all" if one.kept is None else f"{len(one.kept):,}"
        rare = int(((one.counts > 0) & (one.counts <= RARE)).sum())
        rows.append((one.rows, f"{one.counts.sum():,}", f"{(one.counts > 0).sum():,}", f"{rare:,}", *shares, kept, f"{one.covered:.2%}"))
    header = ("rows", "tokens", "words", f"of these ≤ {RARE} times", *(f"top {rank:,}" for rank in RANKS), "kept words", "cover")
    return Table("Words and what they cover", header, tuple(rows))
