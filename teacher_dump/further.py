"""What a recipe asks of a teacher beyond what a store has of it, as passes to answer: ``bert``, ``bert-2``, ``bert-3`` ..."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from online.derive import route
from store import together
from store.codecs import feature_spec
from store.errors import FingerprintMismatch, StoreError
from store.features import FeatureKey, FeatureSpec
from store.manifest import Manifest, PassInfo
from teacher_dump.recipe import DumpRecipe, FeatureRequest
from teacher_dump.selection import Request


@dataclass(frozen=True)
class Further:
    """What a recipe comes to in a store."""

    recipes: tuple[DumpRecipe, ...]
    """One for each pass that is to be answered or to be gone on with, in order."""
    new: tuple[FeatureKey, ...]
    """Features that the last of them adds to what is there, where it is a further pass."""
    others: tuple[str, ...]
    """Passes of this teacher that lack shards and that this recipe alone does not describe."""


def family(passes: Mapping[str, PassInfo], name: str) -> dict[str, PassInfo]:
    """The pass ``name`` and its further ones, in order."""
    return {one: passes[one] for one in _names(name, passes) if one in passes}


def further(recipe: DumpRecipe, requests: Sequence[Request], manifest: Manifest, pending: Mapping[str, int]) -> Further:
    """What is to be done for the ``requests`` of ``recipe``.

    Args:
        pending: Pass -> shards that it lacks.

    Raises:
        FingerprintMismatch: further passes in the store are of another teacher, or the pass has another intervention.
        StoreError: the pass was imported.
    """
    own = family(manifest.passes, recipe.pass_name)
    if not own:
        return Further((recipe,), (), ())
    if own[recipe.pass_name].imported:
        raise StoreError(f"pass {recipe.pass_name} was imported, and its teacher is not known; give this one another pass_name")
    together.check_same_teacher(own)
    if (stored := own[recipe.pass_name].intervention) != recipe.intervention:
        found = "none" if recipe.intervention is None else str(recipe.intervention)
        raise FingerprintMismatch(
            f"{recipe.store} has a pass {recipe.pass_name} with another intervention: expected {stored or 'none'} as stored, "
            f"found {found}; give this one another pass_name"
        )
    asked = {request.key: request for request in requests}
    recipes, others = [], []
    for name, info in own.items():
        keys = [FeatureKey.parse(key) for key in info.requested]
        if pending[name] and asked.keys() >= set(keys):
            recipes.append(_part(recipe, name, [asked[key] for key in keys], ships=info.shipped))
        elif pending[name]:
            others.append(name)
    missing = [request for request in requests if not _answered(request, own)]
    if missing:
        name = next(one for one in _names(recipe.pass_name, own) if one not in own)
        ships = bool(recipe.ship_layers) and not any(info.shipped for info in own.values())
        recipes.append(_part(recipe, name, missing, ships))
    return Further(tuple(recipes), tuple(request.key for request in missing), tuple(others))


def _names(name: str, passes: Mapping[str, PassInfo]) -> Iterator[str]:
    """``bert``, ``bert-2`` and so on, up to the first that is not there."""
    for number in count(1):
        one = name if number == 1 else f"{name}-{number}"
        yield one
        if one not in passes:
            return


def _part(recipe: DumpRecipe, name: str, requests: Sequence[Request], ships: bool) -> DumpRecipe:
    """The recipe of one pass."""
    features = tuple(
        FeatureRequest(
            key=str(request.key), dtype=request.dtype, keep_bits=request.keep_bits, compression=request.compression, ids=request.ids
        )
        for request in requests
    )
    blocks = (recipe.ship_layers or "all") if ships else ()
    return recipe.model_copy(update={"pass_name": name, "features": features, "keep_bits": None, "ship_layers": blocks})


def _answered(request: Request, passes: Mapping[str, PassInfo]) -> bool:
    """Whether the feature is stored as exactly as it is asked for, or follows from features that are."""
    info = next(iter(passes.values()))
    wanted = feature_spec(FeatureKey("final"), request.dtype, 1, keep_bits=request.keep_bits)
    have = [
        key
        for key, (_, spec) in together.stored(passes).items()
        if _as_exact(spec, wanted) and (key != request.key or spec.ids == request.ids)
    ]
    return route(request.key, have, together.statics(passes), info.shape, info.wiring) is not None


def _as_exact(spec: FeatureSpec, wanted: FeatureSpec) -> bool:
    """Whether the declared bound of ``spec`` is within that of ``wanted``, for small numbers as for large ones."""
    sums = spec.error + spec.error_of_largest, wanted.error + wanted.error_of_largest
    return sums[0] <= sums[1] and spec.error_of_largest <= wanted.error_of_largest
