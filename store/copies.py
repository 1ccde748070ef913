"""A store copied: all of it or some rows, passes and features, kept as they are or in another way.

Copying has two steps. Rows, weights and the manifest make a store whose passes have every shard pending; then shard after
shard is put into it and committed. A copy that was killed goes on there. Files that stay as they are become hard links.
"""

import fnmatch
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from store import commits, layout
from store.building import RowWriter
from store.commits import Commit
from store.drop import Settle, matching
from store.features import FeatureKey, FeatureSpec
from store.linking import Links
from store.manifest import SCHEMA, Manifest, PassInfo, Provenance, RowsInfo
from store.merge import Progress, check_same, link_feature, link_rows, link_weights
from store.picked import Picked
from store.reader import Store
from store.recode import Keeping, recoded
from store.schemas import LINKABLE
from store.shards import Seal, token_chunk, write_slot
from store.strict import did_you_mean
from store.table import Ints

Pairs = list[tuple[FeatureSpec, FeatureSpec]]
"""Features as they are kept in the source, and in the copy."""


@dataclass(frozen=True)
class Wanted:
    """What a copy takes of a store and how it keeps it; what is not said is everything, as it is."""

    passes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """Stored keys, with or without their pass; ``*`` stands for any letters."""
    split: str | None = None
    rows: tuple[int, int | None] | None = None
    """Number of the first row and of the one after the last; None is the end."""
    keeping: Keeping = field(default_factory=Keeping)


@dataclass
class Copied:
    """What a copy did."""

    links: Links = field(default_factory=Links)
    written: int = 0
    """Bytes of slot files that were written anew."""
    shards: int = 0
    """(shard, pass) that this run committed."""
    pending: int = 0
    """(shard, pass) that the source has not committed either."""


def copy(path: Path, new: Path, wanted: Wanted, made: Provenance, settle: Settle, progress: Progress) -> Copied:
    """Copy the store at ``path`` to ``new``, or go on with a copy that was cut short.

    Shards that the source has not committed are left out; the same command takes them over later.

    Raises:
        ValueError: what is wanted is not there, or cannot be kept so.
        StoreBusy, StoreError: the source cannot be read, ``new`` holds something else, or there is no room.
    """
    if new.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"expected a folder outside {path} for the copy, found {new}")
    source, did = Store.open(path), Copied()
    specs = {name: specs_of(name, info, wanted) for name, info in source.manifest.passes.items()}
    specs = {name: pairs for name, pairs in specs.items() if pairs}
    _check_wanted(source, wanted, specs)
    passes = {name: _info(name, source.manifest.passes[name], pairs, wanted.keeping, settle) for name, pairs in specs.items()}
    picked = Picked(source, wanted.split, wanted.rows)
    if not layout.manifest(new).exists():
        _begin(picked, new, passes, made, did)
    history = (*source.manifest.history, source.manifest.made)
    origins = tuple(
        origin.model_copy(update={"taken": _taken(origin.taken, picked)})
        for origin, slots in zip(source.manifest.rows.origins, _slots_of(source.manifest.rows), strict=True)
        if picked.counts[slots].any()
    )
    rows = source.manifest.rows.model_copy(update={"origins": origins})
    check_same(new, Manifest(schema_version=SCHEMA, rows=rows, passes=passes, made=made, history=history))
    with commits.exclusive(new):
        layout.building(new).unlink(missing_ok=True)
        target = Store.open(new)
        same = picked.whole and target.manifest.rows.filled == source.manifest.rows.filled
        for name, pairs in specs.items():
            done, have = target.committed(name), source.committed(name)
            for shard in range(target.manifest.rows.slots):
                first, after = target.rows.first[shard : shard + 2].tolist()
                needed = {shard} if same else set(source.rows.at(picked.rows(first, after)).slot.tolist())
                if shard not in done and needed <= have.keys():
                    files = _copy_shard(source, target, name, pairs, shard, picked.rows(first, after), same, did)
                    tokens = {have[number].batch_tokens or 0 for number in needed}  # the least says at least that they were others
                    commits.append(new, Commit(name, shard, files, batch_tokens=min(tokens - {0}, default=None)))
                    did.shards += 1
                did.pending += not needed <= have.keys()
                progress(1, len(specs) * target.manifest.rows.slots)
    return did


def specs_of(name: str, info: PassInfo, wanted: Wanted) -> Pairs:
    """Features of a pass that are wanted: how each is kept, and how it will be.

    A feature that is stored for the wanted positions already is not made a second time.

    Raises:
        ValueError: one cannot be kept so.
    """
    if wanted.passes and name not in wanted.passes:
        return []
    chosen = [spec for spec in info.features if not wanted.features or any(_names(text, name, spec.key) for text in wanted.features)]
    pairs = [(old, wanted.keeping.spec(old, info.shape.vocab)) for old in chosen]
    kept = {new.key for old, new in pairs if new.key == old.key}
    return [(old, new) for old, new in pairs if new.key == old.key or new.key not in kept]


def _check_wanted(source: Store, wanted: Wanted, specs: Mapping[str, object]) -> None:
    known = source.manifest.passes
    for name in wanted.passes:
        if name not in known:
            raise ValueError(f"{source.path} has no pass {name!r}{did_you_mean(name, sorted(known)) if known else ''}")
    for text in wanted.features:
        if not any(_names(text, name, spec.key) for name, info in known.items() for spec in info.features):
            stored = ", ".join(f"{name}/{spec.key}" for name, info in known.items() for spec in info.features) or "no features"
            raise ValueError(f"{source.path} has no stored feature {text}; it holds {stored}")
    if (wanted.passes or wanted.features) and not specs:
        raise ValueError(f"no feature of {', '.join(wanted.features)} is in the passes {', '.join(wanted.passes)}")


def _names(text: str, pass_name: str, key: str) -> bool:
    """Whether ``text`` names a stored feature."""
    name, slash, pattern = text.rpartition("/")
    return (not slash or fnmatch.fnmatchcase(pass_name, name)) and bool(matching(pattern, [key]))


def _info(name: str, info: PassInfo, pairs: Pairs, keeping: Keeping, settle: Settle) -> PassInfo:
    """The pass as it will be."""

    def renamed(text: str) -> str:
        key = FeatureKey.parse(text)
        whole = key.site.startswith("attention") or (key.words and keeping.positions == "mean")  # these exist for all tokens only
        return text if whole else str(keeping.key(key))

    requested = info.requested if keeping.positions is None else tuple(dict.fromkeys(map(renamed, info.requested)))
    new = info.model_copy(update={"features": tuple(new for _, new in pairs), "requested": requested})
    return new if [spec.key for spec in new.features] == [spec.key for spec in info.features] else settle(name, new)


def _taken(before: str | None, picked: Picked) -> str | None:
    """What to say of the rows of an origin of which only some were there ``before``."""
    return f"{picked.taken} of {before}" if picked.taken and before else picked.taken or before


def _slots_of(rows: RowsInfo) -> list[slice]:
    """The slots of each origin."""
    ends = np.cumsum([origin.slots for origin in rows.origins]).tolist()
    return [slice(end - origin.slots, end) for end, origin in zip(ends, rows.origins, strict=True)]


def _begin(picked: Picked, new: Path, passes: dict[str, PassInfo], made: Provenance, did: Copied) -> None:
    """Make the store ``new`` with its rows and weights, and no shard of its passes."""
    source = picked.source
    own, kept = source.manifest.rows, source.manifest.schema_version in LINKABLE
    with RowWriter(new, own.slot_tokens, shlex.join(made.command)) as writer:
        if picked.whole and kept and own.chunk_tokens == token_chunk(own.slot_tokens):
            link_rows(source, new, own, 0, 0, did.links)
            rows = own
        else:
            for origin, slots in zip(own.origins, _slots_of(own), strict=True):
                for slot in range(slots.start, slots.stop):
                    for group in picked.groups(slot):
                        writer.append_group(group)
                writer.end_origin(origin.corpus, origin.options, _taken(origin.taken, picked))
            rows = writer.rows_info(
                copies=own.copies,
                bucket=own.bucket,
                objective=own.objective,
                task=own.task,
                pad_id=own.pad_id,
                tokenizer=own.tokenizer,
                building=own.building,
                domains=own.domains,
            )
        for name, info in passes.items():
            link_weights(source.path, new, name, info, did.links)
        did.links.sync()
        history = (*source.manifest.history, source.manifest.made)
        writer.publish(Manifest(schema_version=SCHEMA, rows=rows, passes=passes, made=made, history=history))


def _copy_shard(
    source: Store, target: Store, name: str, pairs: Pairs, shard: int, members: Ints, same: bool, did: Copied
) -> dict[str, Seal]:
    """Put the files of one shard of a pass into ``target``: a link where the slot stays as it is, else values written anew.

    Args:
        members: Rows of ``source`` that the shard holds.
        same: Whether slots of both stores hold the same rows.
    """
    files: dict[str, Seal] = {}
    rows = source.manifest.rows
    for old, new in pairs:
        chunks = [info.chunk(array, new.feature.positions) for info in (rows, target.manifest.rows) for array in new.arrays]
        half = len(chunks) // 2
        if same and old.arrays == new.arrays and old.key == new.key and chunks[:half] == chunks[half:]:
            files |= link_feature(source, target.path, source.committed(name)[shard], new, shard, did.links)
            continue
        arrays = recoded(source, name, old, new, members)
        for array in new.arrays:
            array_name = layout.array_name(new.feature, array.name)
            path = layout.slot_file(layout.array(target.path, name, array_name), shard)
            path.unlink(missing_ok=True)  # a copy that was killed before its commit line may have left one
            files[array_name] = write_slot(path, arrays[array.name], target.rows.shard(array, new.feature.positions, shard))
            did.written += files[array_name].size
    did.links.sync()
    return files
