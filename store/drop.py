"""Passes and features taken out of a store, and the disk that they filled given back."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from store import commits, hierarchy, layout
from store.commits import Commit
from store.errors import StoreError
from store.manifest import SCHEMA, Manifest, PassInfo, Provenance, read_manifest
from store.strays import Freed, remove, strays
from store.strict import did_you_mean

Settle = Callable[[str, PassInfo], PassInfo]
"""What a pass is once features of it have gone: what was asked of it that still follows, and the weights for that."""


def drop(path: Path, targets: Sequence[str], made: Provenance, settle: Settle) -> Freed:
    """Remove passes (``bert``) and stored features (``bert/hidden.6@all``; ``*`` stands for any letters) from the store at ``path``.

    The manifest is replaced first, and the files go afterwards; a drop that was killed is finished by the same or any other drop.
    Readers that have the store open keep the files that they have mapped.

    Raises:
        ValueError: a target is not in the store, or ``settle`` does not agree.
        StoreBusy: another process writes to the store.
        StoreError: there is none, or it is of an older schema.
    """
    read_manifest(path)
    with commits.exclusive(path):
        manifest = read_manifest(path)
        if manifest.schema_version != SCHEMA:
            raise StoreError(
                f"{path} has schema version {manifest.schema_version}, which is only read; leave features out with: "
                f"teacher-dump copy {path} NEW-FOLDER --feature KEY"
            )
        if made.command == manifest.made.command and not _all_there(manifest, targets):
            return remove(strays(path))  # this very drop, cut short after the manifest was replaced
        left = without(manifest, targets)
        passes = {name: info if info is manifest.passes[name] else settle(name, info) for name, info in left.items()}
        committed = commits.replay(path)
        gone = manifest.passes.keys() - passes.keys()
        if any(committed.get(name) for name in gone):  # a later pass of this name must not find them
            commits.write(path, [commit for name in passes for commit in committed.get(name, {}).values()])
        for name in gone:
            if (folder := layout.inside(path, path / layout.safe(name))).exists():
                remove([layout.dropped(path, name)])  # of an earlier pass of this name, if that was not finished
                folder.rename(layout.dropped(path, name))
        if passes != manifest.passes:
            hierarchy.write(path, manifest.changed(made, manifest.rows, passes))
        kept = [_only(commit, info) for name, info in passes.items() for commit in committed.get(name, {}).values()]
        if kept != [commit for shards in committed.values() for commit in shards.values()]:
            commits.write(path, kept)
        return remove(strays(path))


def _all_there(manifest: Manifest, targets: Sequence[str]) -> bool:
    try:
        without(manifest, targets)
    except ValueError:
        return False
    return True


def without(manifest: Manifest, targets: Sequence[str]) -> dict[str, PassInfo]:
    """The passes that are left, those without a target untouched; a pass without features is gone.

    Raises:
        ValueError: a target is not in the store.
    """
    passes = dict(manifest.passes)
    for target in targets:
        name, _, pattern = target.partition("/")
        if name not in manifest.passes:
            raise ValueError(f"the store has no pass {name!r}{did_you_mean(name, sorted(manifest.passes)) if manifest.passes else ''}")
        if not pattern:
            passes.pop(name, None)
            continue
        stored = [spec.key for spec in manifest.passes[name].features]
        found = set(matching(pattern, stored))
        if not found:
            derived = [key for key in manifest.passes[name].requested if key not in stored and fnmatch.fnmatchcase(key, pattern)]
            why = f"{derived[0]} is not stored but derived when read" if derived else f"pass {name} holds {', '.join(stored)}"
            raise ValueError(f"{target}: no stored feature of this name: {why}")
        if name in passes:
            left = tuple(spec for spec in passes[name].features if spec.key not in found)
            passes[name] = passes[name].model_copy(update={"features": left})
    return {name: info for name, info in passes.items() if info.features}


def matching(pattern: str, keys: Sequence[str]) -> list[str]:
    """The ``keys`` (without pass) that ``pattern`` names; positions may be left out where the site has one choice of them."""
    return [key for key in keys if fnmatch.fnmatchcase(key, pattern) or key.partition("@")[0] == pattern]


def _only(commit: Commit, info: PassInfo) -> Commit:
    """A commit without the files of features that the pass has no more."""
    names = {layout.array_name(spec.feature, array.name) for spec in info.features for array in spec.arrays}
    return replace(commit, files={name: seal for name, seal in commit.files.items() if name in names})
