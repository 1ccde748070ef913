"""Rows of several builds as one table, and what must be alike for that."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import pyarrow as pa

from store import layout
from store.errors import FingerprintMismatch
from store.manifest import Filled, Manifest, PassInfo, RowsInfo
from store.rows import IDENTITY
from store.strict import Strict

_COUNTED = {"rows", "tokens", "slots", "filled", "splits", "parts", "slot_crcs", "origins"}
"""Fields of RowsInfo that add up; all others must be alike."""
FOR_PEOPLE = {"model", "made", "batch_tokens"}
"""Fields of a pass that say how it was made, not what it is."""


Identities = Callable[[str, int], pa.Table]
"""Name of a build and number of one of its origins -> the columns store.rows.IDENTITY of its rows."""


def joined(builds: Mapping[str, RowsInfo], identities: Identities | None = None) -> RowsInfo:
    """Rows of ``builds`` (name for people -> rows), one after the other, as one table.

    Splits keep the order in which they are first met; :func:`split_codes` says what that does to a build.

    Args:
        identities: Tells the rows of the same texts apart; without it, builds that share texts are taken to share rows.

    Raises:
        FingerprintMismatch: they were built in different ways, or share rows; the message names field and builds.
    """
    names, infos = list(builds), list(builds.values())
    for name, info in builds.items():
        if field := different(infos[0], info, _COUNTED):
            raise FingerprintMismatch(
                f"{name} has another {field} than {names[0]}: expected {short(getattr(infos[0], field))}, "
                f"found {short(getattr(info, field))}; only rows that were built in the same way go into one store"
            )
        if info.slot_crcs.keys() != infos[0].slot_crcs.keys():
            raise FingerprintMismatch(f"the rows of {name} and {names[0]} are kept in different ways; `teacher-dump copy` both first")
    _check_overlap(builds, identities)
    splits: Counter[str] = Counter()
    for info in infos:
        splits.update(info.splits)
    parts = chain.from_iterable(info.parts for info in infos)
    return infos[0].model_copy(
        update={
            "rows": sum(info.rows for info in infos),
            "tokens": sum(info.tokens for info in infos),
            "slots": sum(info.slots for info in infos),
            "filled": Filled(
                rows=tuple(chain.from_iterable(info.filled.rows for info in infos)),
                tokens=tuple(chain.from_iterable(info.filled.tokens for info in infos)),
                labelled=tuple(chain.from_iterable(info.filled.labelled for info in infos)),
            ),
            "splits": dict(splits),
            "parts": tuple(part.model_copy(update={"file": layout.rows_part_name(number)}) for number, part in enumerate(parts)),
            "slot_crcs": {name: tuple(chain.from_iterable(info.slot_crcs[name] for info in infos)) for name in infos[0].slot_crcs},
            "origins": tuple(chain.from_iterable(info.origins for info in infos)),
        }
    )


def split_codes(own: RowsInfo, whole: RowsInfo) -> tuple[int, ...]:
    """Place in ``whole.splits`` of each split of ``own``."""
    order = list(whole.splits)
    return tuple(order.index(name) for name in own.splits)


def joined_passes(stores: Mapping[str, Manifest]) -> dict[str, PassInfo]:
    """All passes of ``stores``, each as the first store has it.

    Raises:
        FingerprintMismatch: passes of one name are not the same; the message names the field.
    """
    passes: dict[str, PassInfo] = {}
    first: dict[str, str] = {}
    for store, manifest in stores.items():
        for name, info in manifest.passes.items():
            known = passes.setdefault(name, info)
            first.setdefault(name, store)
            if field := different(known, info, FOR_PEOPLE):
                raise FingerprintMismatch(
                    f"pass {name} of {store} has another {field} than that of {first[name]}: expected {short(getattr(known, field))}, "
                    f"found {short(getattr(info, field))}; passes of one name must be the same teacher's same answers"
                )
            if info.batch_tokens is None:  # nothing may be said of all shards then
                passes[name] = known.model_copy(update={"batch_tokens": None})
    return passes


def different(one: Strict, other: Strict, aside: set[str]) -> str | None:
    """The first field, but for those set ``aside``, in which two records of one kind differ."""
    fields = (field for field in type(one).model_fields if field not in aside)
    return next((field for field in fields if getattr(one, field) != getattr(other, field)), None)


def short(value: object) -> str:
    """A value in a message, cut where it is long; of a feature or a weight its name and type."""
    text = ", ".join(_names(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _names(values: Sequence[object]) -> Iterator[str]:
    for value in values:
        name = getattr(value, "key", getattr(value, "name", None))
        types = [array.dtype for array in getattr(value, "arrays", ())] or [getattr(value, "dtype", "")]
        yield str(value) if name is None else f"{name} in {' + '.join(dict.fromkeys(types))}".removesuffix(" in ")


def _check_overlap(builds: Mapping[str, RowsInfo], identities: Identities | None) -> None:
    """Refuse rows that are there twice. Parts of one build (store.copies) may share texts, but no row."""
    seen: dict[str, list[tuple[str, int]]] = {}
    for name, info in builds.items():
        for number, origin in enumerate(info.origins):
            for known, other in seen.setdefault(origin.corpus, []):
                parts = origin.taken is not None and builds[known].origins[other].taken is not None
                if not (parts and identities and _differ(identities(known, other), identities(name, number))):
                    raise FingerprintMismatch(
                        f"{name} holds rows of the same texts as {known} (corpus {origin.corpus[:16]}): rows would be there twice; "
                        "leave one of them out"
                    )
            seen[origin.corpus].append((name, number))


def _differ(one: pa.Table, other: pa.Table) -> bool:
    """Whether no row is in both."""
    both = pa.concat_tables([one, other])
    return int(both.group_by(list(IDENTITY)).aggregate([]).num_rows) == both.num_rows
