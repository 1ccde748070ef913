"""Stores of different rows as one, without copying what they hold."""

import shlex
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from store import commits, layout
from store.building import RowWriter
from store.commits import Commit
from store.errors import StoreError
from store.features import FeatureSpec
from store.joins import joined, joined_passes, split_codes
from store.linking import Links
from store.manifest import SCHEMA, Manifest, PassInfo, Provenance, RowsInfo, read_manifest
from store.reader import Store
from store.remote import local
from store.rows import IDENTITY, NUMBERS, ROW_ARRAYS
from store.shards import Seal, Shard, write_slot

Progress = Callable[[int, int], object]
"""Told how many shards more are done, and how many there are."""


def merge(new: Path, paths: Sequence[Path], made: Provenance, progress: Progress) -> Links | None:
    """Make the store ``new`` of the rows and passes of the stores at ``paths``, in this order; None where it is there already.

    Rows and features are hard links where the file system allows it, so that they take no disk. A pass that some of the
    stores lack has shards pending where their rows are. Nothing counts before the manifest, which comes last.

    Raises:
        ValueError: fewer than two stores.
        FingerprintMismatch: the stores do not go together; the message names the field.
        StoreBusy, StoreError: a store cannot be read, ``new`` holds something else, or there is no room.
    """
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"expected two or more different stores to merge, found {', '.join(map(str, paths))}")
    stores = {str(path): Store.open(local(path)) for path in paths}
    manifests = {name: store.manifest for name, store in stores.items()}
    for name, manifest in manifests.items():
        if manifest.schema_version != SCHEMA:
            raise StoreError(f"{name} has schema version {manifest.schema_version}; write it as {SCHEMA} first with: teacher-dump copy")
    rows = joined({name: manifest.rows for name, manifest in manifests.items()}, lambda name, number: _identities(stores[name], number))
    passes = joined_passes(manifests)
    history = tuple(chain.from_iterable((*manifest.history, manifest.made) for manifest in manifests.values()))
    manifest = Manifest(schema_version=SCHEMA, rows=rows, passes=passes, made=made, history=history)
    if layout.manifest(new).exists():
        check_same(new, manifest)
        layout.building(new).unlink(missing_ok=True)
        return None
    links, done = Links(), []
    shards = sum(len(store.committed(name)) for store in stores.values() for name in store.manifest.passes)
    with RowWriter(new, rows.slot_tokens, shlex.join(made.command)) as writer:
        numbers, base, parts = [], 0, 0
        for store in stores.values():
            numbers += link_rows(store, new, rows, base, parts, links)
            for name in store.manifest.passes:
                info = store.manifest.passes[name]
                for shard, commit in store.committed(name).items():
                    files: dict[str, Seal] = {}
                    for spec in info.features:
                        files |= link_feature(store, new, commit, spec, base + shard, links)
                    tokens = commit.batch_tokens or info.batch_tokens
                    done.append(Commit(name, base + shard, files, batch_tokens=None if tokens == passes[name].batch_tokens else tokens))
                    progress(1, shards)
            base += store.manifest.rows.slots
            parts += len(store.manifest.rows.parts)
        for name, info in passes.items():
            link_weights(next(store.path for store in stores.values() if name in store.manifest.passes), new, name, info, links)
        links.sync()
        commits.write(new, done)
        crcs = {**rows.slot_crcs, "numbers": tuple(numbers)}
        writer.publish(manifest.model_copy(update={"rows": rows.model_copy(update={"slot_crcs": crcs})}))
    return links


def _identities(store: Store, number: int) -> pa.Table:
    """The columns IDENTITY of the rows of an origin."""
    edges = np.cumsum([0, *(origin.slots for origin in store.manifest.rows.origins)])
    first, after = store.rows.first[edges[number : number + 2]].tolist()
    return store.rows.table.select(list(IDENTITY)).slice(first, after - first)


def check_same(path: Path, wanted: Manifest) -> None:
    """Accept the finished store at ``path`` as one that the same command has made; raises StoreError for any other."""
    found = read_manifest(path)
    origins = [[(origin.corpus, origin.taken) for origin in one.rows.origins] for one in (found, wanted)]
    if found.passes != wanted.passes or found.history != wanted.history or origins[0] != origins[1]:
        raise StoreError(f"{path} already holds another store; give another folder, or remove this one")


def link_rows(store: Store, new: Path, rows: RowsInfo, base: int, parts: int, links: Links) -> list[int]:
    """Put the rows of ``store`` from slot ``base`` on into ``new``; checksums of the slots of its array ``numbers``.

    That array is written anew where its numbers for splits are others than in ``rows``; all else is linked.
    """
    path, own = store.path, store.manifest.rows
    folders = [(layout.rows_array(path, name), layout.rows_array(new, name), 2) for name in own.row_arrays]
    folders += [(layout.tokens(path, array.name), layout.tokens(new, array.name), 1) for array in own.token_arrays]
    for source, _, _ in folders:
        layout.inside(path, source)
    codes = np.array(split_codes(own, rows), np.int32)
    renumbered = not np.array_equal(codes, np.arange(len(codes)))
    numbers = list(own.slot_crcs["numbers"])
    for slot in range(own.slots):
        for source, target, dimensions in folders:
            if renumbered and target == layout.rows_array(new, "numbers"):
                continue
            links.put(layout.slot_file(source, slot, dimensions), layout.slot_file(target, base + slot, dimensions))
        if renumbered:
            values = store.rows.in_slot(slot).copy()
            values[:, NUMBERS.index("split")] = codes[values[:, NUMBERS.index("split")]]
            file = layout.slot_file(layout.rows_array(new, "numbers"), base + slot)
            numbers[slot] = write_slot(file, values, Shard(ROW_ARRAYS["numbers"], own.slot_tokens, len(values))).crc32c
    for number in range(len(own.parts)):
        links.put(layout.rows_part(path, number), layout.rows_part(new, parts + number))
    return numbers


def link_feature(store: Store, new: Path, commit: Commit, spec: FeatureSpec, shard: int, links: Links) -> dict[str, Seal]:
    """Put the files of a feature in one committed shard into ``new``, as those of ``shard`` there; what to commit."""
    files = {}
    for array in spec.arrays:
        name = layout.array_name(spec.feature, array.name)
        source, target = (layout.array(path, commit.pass_name, name) for path in (store.path, new))
        links.put(layout.slot_file(layout.inside(store.path, source), commit.shard), layout.slot_file(target, shard))
        files[name] = commit.files[name]
    return files


def link_weights(path: Path, new: Path, name: str, info: PassInfo, links: Links) -> None:
    """Put what ships once with a pass into ``new``: the weights that derivations need, and the teacher's folder."""
    for static in info.statics:
        links.put_folder(layout.inside(path, layout.static(path, name, static.name)), layout.static(new, name, static.name))
    links.put_folder(layout.inside(path, layout.model(path, name)), layout.model(new, name))
