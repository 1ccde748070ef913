"""Passes and features taken out of a store, and what that gave back."""

from collections.abc import Sequence
from pathlib import Path

from online.figures import size
from store.drop import drop
from store.manifest import PassInfo, read_manifest
from store.provenance import provenance
from teacher_dump.coverage import forget_errors, settle


def drop_from(store: Path, targets: Sequence[str], force: bool, command: Sequence[str]) -> str:
    """Drop ``targets`` and say what that freed.

    Args:
        force: Also where requested features follow from what is dropped, and are lost with it.

    Raises:
        ValueError: a target is not there, or others follow from it.
        StoreError: as store.drop.drop.
    """
    before = read_manifest(store).passes
    lost: list[str] = []

    def settled(name: str, info: PassInfo) -> PassInfo:
        gone = {spec.key for spec in before[name].features} - {spec.key for spec in info.features}
        info, uncovered = settle(info)
        also = [f"{name}/{key}" for key in uncovered if key not in gone]
        if also and not force:
            raise ValueError(
                f"{', '.join(also)} {'follows' if len(also) == 1 else 'follow'} from what is to be dropped of pass {name}, and would be "
                "lost with it; drop it nevertheless with --force"
            )
        lost.extend(also)
        return info

    freed = drop(store, targets, provenance(command), settled)
    after = read_manifest(store).passes
    forget_errors(store, before, after)
    lines = [f"{store}: dropped {', '.join(_gone(before, after)) or 'nothing new'}"]
    lines += [f"lost with it: {', '.join(lost)}"] if lost else []
    shared = f"; {size(freed.shared)} more belong to other stores too and stay there" if freed.shared else ""
    return "\n".join([*lines, f"{freed.files:,} files removed, {size(freed.freed)} of disk freed{shared}"])


def _gone(before: dict[str, PassInfo], after: dict[str, PassInfo]) -> list[str]:
    gone = []
    for name, info in before.items():
        left = {spec.key for spec in after[name].features} if name in after else set()
        gone += [f"{name}/{spec.key}" for spec in info.features if spec.key not in left] if left else [f"pass {name}"]
    return gone
