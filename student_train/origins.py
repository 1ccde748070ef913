"""Where a phase's student comes from, in words: the lines of its model card about teachers and data."""

from collections.abc import Mapping
from pathlib import Path

from online.models import LoadedModel
from store.reader import Store
from store.together import names
from student_train.outline import Outline
from student_train.recipe import PhaseSpec


def teacher_lines(one: Outline, stores: Mapping[Path, Store], live: Mapping[str, LoadedModel]) -> list[str]:
    """Who taught: teachers at work by name (``live``), or passes of stores."""
    if live:
        return [
            f"at work in the job: `{spec.model}`, {live[name].shape.family} with {live[name].shape.layers} blocks, "
            f"weights `{live[name].fingerprint[:16]}`"
            for name, spec in one.phase.live.items()
        ]
    passes = {(data.store, passes) for data in one.phase.data if data in one.taught for passes in data.answers.values()}
    lines = []
    for path, name in sorted(passes, key=str):
        info = stores[path].manifest.passes[names(name)[0]]
        of = f"{'pass' if isinstance(name, str) else 'passes'} {', '.join(f'`{one}`' for one in names(name))} of `{path}`"
        lines.append(f"{of}: `{info.model}`, {info.shape.family} with {info.shape.layers} blocks, weights `{info.teacher[:16]}`")
    return lines


def data_lines(phase: PhaseSpec, stores: Mapping[Path, Store]) -> list[str]:
    """On which rows it was trained and measured."""
    lines = []
    for use, specs in (("trained on", phase.data), ("measured on", phase.evaluate)):
        for data in specs:
            rows = stores[data.store].manifest.rows
            lines.append(f"{use} split `{data.split}` of `{data.store}`: {rows.splits[data.split]:,} rows, corpus `{rows.corpus[:16]}`")
    return lines
