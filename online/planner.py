"""Choose what to store: the features of fewest bytes from which all requested ones follow.

Attention has no stored form. With grouped-query attention ``value.i`` alone is smaller than the ``input.i`` it follows
from; with the scores of the same block also wanted, ``input.i`` is all that is stored; where ``hidden.(i-1)`` is kept
anyway, it costs nothing.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, product
from typing import NamedTuple

from online.derive import PAIRWISE, route, steps
from store.codecs import feature_spec
from store.features import LAYERED, MANTISSA, SITES, FeatureKey, StoreDtype
from store.shape import ModelShape, Wiring
from store.table import RowTable


class Units(NamedTuple):
    """How many values a row has on average."""

    tokens: float = 128.0
    labelled: float = 20.0

    @classmethod
    def average(cls, rows: RowTable) -> "Units":
        """Those of the rows of a store."""
        return cls(rows.info.tokens / len(rows), float(rows.slot_labelled.sum()) / len(rows))

    def of(self, key: FeatureKey) -> float:
        """Stored units of ``key`` in an average row."""
        if key.per_row:
            return 1.0
        return self.tokens if key.positions == "all" else self.labelled


TYPICAL = Units()


@dataclass(frozen=True)
class Plan:
    """What to store of a teacher, or to read of a store."""

    stored: dict[FeatureKey, StoreDtype]
    """Key and type of its numbers."""
    statics: tuple[str, ...]
    """Weights that derivations need, and biases of which the model may have none."""
    derived: dict[FeatureKey, tuple[FeatureKey, ...]]
    """Requested keys that are not stored, and what they follow from."""


def plan(requests: Mapping[FeatureKey, StoreDtype], shape: ModelShape, wiring: Wiring, units: Units = TYPICAL) -> Plan:
    """The features of fewest bytes a row from which every request follows, each at its type or a wider one.

    Args:
        requests: Keys without pass names, with the type each is wanted in.

    Raises:
        ValueError: a request can be neither stored nor derived; the message says why.
    """
    unread = PAIRWISE if shape.attends else LAYERED - {"hidden"}
    covers = {key: _covers(key, lambda key: key.site not in unread, None, shape, wiring) for key in requests}
    for key, ways in covers.items():
        if not ways:
            raise ValueError(f"{key} can be neither stored nor derived: {_reason(key, shape, wiring)}")

    def price(key: FeatureKey, dtype: StoreDtype) -> float:
        return units.of(key) * feature_spec(key, dtype, shape.unit_width(key)).unit_bytes

    return _explained(requests, _cheapest(requests, covers, shape, price), None, shape, wiring)


def uncovered(
    wanted: Iterable[FeatureKey], stored: Collection[FeatureKey], statics: Collection[str], shape: ModelShape, wiring: Wiring
) -> list[FeatureKey]:
    """Those of ``wanted`` that do not follow from features ``stored`` and weights ``statics``."""
    return [key for key in wanted if route(key, stored, statics, shape, wiring) is None]


def cover(
    wanted: Iterable[FeatureKey],
    stored: Mapping[FeatureKey, int],
    statics: Collection[str],
    shape: ModelShape,
    wiring: Wiring,
    units: Units = TYPICAL,
) -> Plan:
    """What to read of a store that covers all of ``wanted``: as :func:`plan`, but of what is there.

    Args:
        stored: Keys without pass names, with the bytes of one unit.
        statics: Names of the weights that the store carries.
    """
    requests: dict[FeatureKey, StoreDtype] = dict.fromkeys(wanted, "float32")
    covers = {key: _covers(key, stored.__contains__, statics, shape, wiring) for key in requests}
    chosen = _cheapest(requests, covers, shape, lambda key, dtype: units.of(key) * stored[key])
    return _explained(requests, chosen, statics, shape, wiring)


def _explained(
    requests: Iterable[FeatureKey], stored: dict[FeatureKey, StoreDtype], have: Collection[str] | None, shape: ModelShape, wiring: Wiring
) -> Plan:
    """A plan that stores ``stored``, with the weights that lead from there to the requests."""
    statics: dict[str, None] = {}
    derived = {}
    for key in requests:
        if way := route(key, stored, have, shape, wiring):
            statics |= dict.fromkeys(name for _, step in way for name in step.statics)
            derived[key] = tuple(dict.fromkeys(source for _, step in way for source in step.sources if source in stored))
    return Plan(stored, with_biases(statics), derived)


def with_biases(statics: Iterable[str]) -> tuple[str, ...]:
    """The weights ``statics``, each followed by the bias that a model may have beside it; norms of heads have none."""
    found: list[str] = []
    for name in statics:
        found.append(name)
        if name.endswith(".weight") and not name.endswith(("query_norm.weight", "key_norm.weight")):
            found.append(f"{name.removesuffix('weight')}bias")
    return tuple(found)


Cover = frozenset[FeatureKey]
"""Keys that suffice for another."""


def _covers(
    key: FeatureKey,
    storable: Callable[[FeatureKey], bool],
    statics: Collection[str] | None,
    shape: ModelShape,
    wiring: Wiring,
    path: frozenset[FeatureKey] = frozenset(),
) -> list[Cover]:
    """Every smallest set of storable keys from which ``key`` follows."""
    found = {frozenset({key})} if storable(key) else set()
    for step in steps(key, shape, wiring):
        if path.isdisjoint(step.sources) and (statics is None or all(name in statics for name in step.statics)):
            parts = [_covers(source, storable, statics, shape, wiring, path | {key}) for source in step.sources]
            found |= {frozenset().union(*choice) for choice in product(*parts)}
    return [one for one in found if not any(other < one for other in found)]


def _cheapest(
    requests: Mapping[FeatureKey, StoreDtype],
    covers: Mapping[FeatureKey, list[Cover]],
    shape: ModelShape,
    price: Callable[[FeatureKey, StoreDtype], float],
) -> dict[FeatureKey, StoreDtype]:
    """The cheapest union of one cover of each request.

    Nothing leads from one block to the next, so blocks are planned one by one. Within a block all unions are tried but
    those that hold another.
    """

    def block(key: FeatureKey) -> int:
        if key.layer is None:
            return shape.layers + 1
        return key.layer + (key.site == "hidden")

    def rank(choice: dict[FeatureKey, StoreDtype]) -> tuple[float, int, int, int, list[str]]:
        """Bytes; among equals few arrays, then requested ones, then those nearest to what is requested."""
        nearness = sum(list(SITES).index(key.site) for key in choice)
        total = round(sum(price(key, dtype) for key, dtype in choice.items()), 3)
        return total, len(choice), -sum(key in requests for key in choice), -nearness, sorted(map(str, choice))

    chosen: dict[FeatureKey, StoreDtype] = {}
    for _, keys in groupby(sorted(requests, key=lambda key: (block(key), len(covers[key]))), block):
        unions: list[dict[FeatureKey, StoreDtype]] = [{}]
        for key in keys:
            joined = [_join(union, one, requests[key]) for union in unions for one in covers[key]]
            unions = _minimal(joined)
        cheapest: dict[FeatureKey, StoreDtype] = min(unions, key=rank)
        chosen |= cheapest
    return chosen


def _join(union: dict[FeatureKey, StoreDtype], keys: Cover, dtype: StoreDtype) -> dict[FeatureKey, StoreDtype]:
    """``union`` with ``keys`` at ``dtype``; a key wanted in two types is kept in one that holds both."""
    return union | {key: _widest(union.get(key, dtype), dtype) for key in keys}


def _widest(one: StoreDtype, other: StoreDtype) -> StoreDtype:
    """The smallest type that is as exact as both; float16 and bfloat16 each lack what the other has."""
    if one == other:
        return one
    floats = {one, other} & MANTISSA.keys()
    if not floats:
        return "bfloat16"  # more exact than int8 for small numbers and than float8 for large ones
    return "float16" if floats == {"float16"} else "bfloat16" if floats == {"bfloat16"} else "float32"


def _minimal(unions: list[dict[FeatureKey, StoreDtype]]) -> list[dict[FeatureKey, StoreDtype]]:
    """Those of ``unions`` that hold no other."""

    def within(one: dict[FeatureKey, StoreDtype], other: dict[FeatureKey, StoreDtype]) -> bool:
        return all(key in other and _widest(dtype, other[key]) == other[key] for key, dtype in one.items())

    kept: list[dict[FeatureKey, StoreDtype]] = []
    for union in sorted(unions, key=len):
        if not any(within(smaller, union) for smaller in kept):
            kept = [*(one for one in kept if not within(union, one)), union]
    return kept


def _reason(key: FeatureKey, shape: ModelShape, wiring: Wiring) -> str:
    if not shape.attends:
        return "a model given by module paths serves hidden, final and logits; attention needs an entry in online.families.FAMILIES"
    if key.site in PAIRWISE and key.positions != "all":
        return f"it has a value for every pair of tokens, so only {key.at('all')} exists"
    if wiring.rotary_by_length:
        return "the frequencies of its rotary embedding change with the length of the input; query, key and value can be stored"
    return "the model has no such feature"
