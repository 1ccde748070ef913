"""Several passes of a store in which one teacher answered for different features, read as one."""

from collections.abc import Mapping

from store.errors import FingerprintMismatch
from store.features import FeatureKey, FeatureSpec
from store.joins import short
from store.manifest import PassInfo

PassName = str | tuple[str, ...]
"""A pass, or several of one teacher."""

_TEACHER = ("teacher", "dtype", "shape", "wiring", "intervention")
"""Fields of a pass that say who answered, and with what written into it."""


def names(pass_name: PassName | None) -> tuple[str, ...]:
    """The names that a recipe gives; none for None."""
    if pass_name is None:
        return ()
    return (pass_name,) if isinstance(pass_name, str) else pass_name


def fingerprint(passes: Mapping[str, PassInfo], pass_name: PassName | None) -> str | None:
    """That of the teacher of ``pass_name``; None where there is no such pass."""
    return next((passes[name].teacher for name in names(pass_name) if name in passes), None)


def check_same_teacher(passes: Mapping[str, PassInfo]) -> None:
    """Refuse ``passes`` that are not the same teacher's, run in the same type; raises FingerprintMismatch."""
    first, known = next(iter(passes.items()))
    for name, info in passes.items():
        if name != first and info.imported:
            raise FingerprintMismatch(f"pass {name} was imported: whether its teacher is that of {first} is not known; read it alone")
        for field in _TEACHER:
            if getattr(info, field) != getattr(known, field):
                raise FingerprintMismatch(
                    f"pass {name} is not of the teacher of pass {first}: its {field} is {short(getattr(info, field))}, expected "
                    f"{short(getattr(known, field))}; only passes of one teacher are read as one"
                )


def stored(passes: Mapping[str, PassInfo]) -> dict[FeatureKey, tuple[str, FeatureSpec]]:
    """Each key that is stored -> the pass that has it most exactly, of equal ones the first, and how it is kept there."""
    found: dict[FeatureKey, tuple[str, FeatureSpec]] = {}
    for name, info in passes.items():
        for spec in info.features:
            known = found.get(spec.feature)
            if known is None or _error(spec) < _error(known[1]):
                found[spec.feature] = name, spec
    return found


def statics(passes: Mapping[str, PassInfo]) -> dict[str, str]:
    """Each weight that is there -> the first pass that carries it."""
    found: dict[str, str] = {}
    for name, info in passes.items():
        for static in info.statics:
            found.setdefault(static.name, name)
    return found


def _error(spec: FeatureSpec) -> float:
    return spec.error + spec.error_of_largest
