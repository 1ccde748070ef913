"""Whole stores to object storage and back; both can be killed and go on where they were.

Objects have the names of the store's files. Each is marked with its size and checksum (``seal``), so that one which is there
already is not sent again. What a file says comes after what it speaks of: slots and weights, then all commits in one table
(of a new generation, so that logs that may lie there no longer count), the manifest last. Which files ship with a teacher is
listed beside them, in ``model/<pass>.list``.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from store import commits, hierarchy, inventory, layout, lines
from store.commits import Commit
from store.errors import CorruptShard, FingerprintMismatch, StoreError
from store.inventory import Item
from store.manifest import SCHEMA, Manifest, manifest_bytes, read_manifest
from store.mirror import read_metadata
from store.publish import crc32c, make_folder, replace, sync_file, sync_folder
from store.remote import Connection, Get, Put, key_of, no_store, url_of
from store.shards import Seal

_log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""How often a store that is still written is looked at."""

COMING = ".downloading"
"""Lies in a folder while a store is copied into it."""

_IDENTITY = ("teacher", "dtype", "shape", "wiring")
"""Fields of a pass that make it another one."""
_TOGETHER = 64

Committed = Mapping[str, Mapping[int, Commit]]
Progress = Callable[[int, int], object]
"""Told how many files more are done, and how many there are."""


def upload(path: Path, url: str, progress: Progress, follow: bool = False) -> int:
    """Put the store in folder ``path`` at ``url``, or bring what is there up to it; the bytes that were sent.

    Files are read whole and compared with what was committed before they are sent. Nothing that is there is removed.

    Args:
        follow: Go on until every shard of every pass is there.

    Raises:
        FingerprintMismatch: another store is there.
        CorruptShard: a file of the store is damaged; the message names it.
        StoreError: there is no store, or the storage does not take it.
    """
    connection = _connection(url)
    sending = _Sending(connection, path, progress)
    known: Manifest | None = None
    earlier, said, generation = _state(connection)
    while True:
        now, manifest = commits.replay(path), read_manifest(path)
        if known is None:
            _check_schema(path, manifest)
            if earlier is not None and (other := _other(earlier, manifest)):
                raise FingerprintMismatch(f"{url} holds another store than {path}: {other}; give it another address")
        if manifest != known:
            sending.files([*inventory.row_items(path, manifest), *_weights(path, manifest)])
            sending.texts(_models(sending, path, manifest))
            sending.texts({f"{name}/zarr.json".lstrip("/"): data for name, data in hierarchy.documents(manifest).items()})
        sending.files(list(inventory.shard_items(path, manifest, _all(now))))
        if said is None or _seals(now) != _seals(said):
            generation += 1
            sending.texts({"commits/table.log": lines.table_bytes(generation, _all(now))})
        sending.texts({layout.MANIFEST: manifest_bytes(manifest)})
        known, said = manifest, now
        if not follow or (now and all(len(now.get(name, ())) >= manifest.rows.slots for name in manifest.passes)):
            return sending.bytes
        done = sum(map(len, now.values()))
        _log.info("%s: %d of %d shards are there; waiting for more", url, done, manifest.rows.slots * len(manifest.passes))
        time.sleep(POLL_SECONDS)


def download(url: str, path: Path, progress: Progress) -> int:
    """Copy the store at ``url`` into folder ``path``, or bring an earlier copy up to it; the bytes that were read.

    Raises:
        FingerprintMismatch: another store is in the folder, or one with shards that the store at ``url`` lacks.
        CorruptShard: what lies there is not what was committed; the message names it.
        StoreError: there is no store, the storage does not answer, or the folder cannot be written.
    """
    connection = _connection(url)
    with tempfile.TemporaryDirectory(prefix="teachercache-") as folder, ExitStack() as held:
        kept = Path(folder)
        if not read_metadata(connection, kept):
            raise no_store(url)
        manifest = read_manifest(kept)
        _check_schema(url, manifest)
        committed = commits.replay(kept)
        _begin(url, path, manifest, committed)
        held.enter_context(commits.exclusive(path))
        items = [*inventory.row_items(path, manifest), *_weights(path, manifest), *inventory.metadata_items(path, manifest)]
        items += inventory.shard_items(path, manifest, _all(committed))
        for name in manifest.passes:
            items += _shipped(connection, kept, path, name)
        read = _take(connection, path, items, progress)
        commits.write(path, _all(committed))
        replace(layout.manifest(path), manifest_bytes(manifest))
        (path / COMING).unlink(missing_ok=True)
    return read


class _Sending:
    """What an upload sends, and has sent."""

    def __init__(self, connection: Connection, path: Path, progress: Progress) -> None:
        self.bytes = 0
        self._connection, self._path, self._progress = connection, path, progress
        self._there: set[tuple[str, str]] = set()

    def files(self, items: Sequence[Item]) -> None:
        """Send files that are not there; each is looked at before."""
        new = {key: item for item in items if ((key := key_of(self._path, item.path)), item.seal) not in self._there}

        def puts() -> Iterator[Put]:
            for key, item in new.items():
                if what := item.problem(item.path):
                    raise CorruptShard(f"{item.path}: {what}; mend it with teacher-dump verify --repair {self._path}")
                yield Put(key, str(item.path), item.seal)

        self._send(puts(), len(new))

    def texts(self, texts: Mapping[str, bytes]) -> None:
        """Send what is in no file of the store, or may change while it is sent."""
        with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
            puts = []
            for number, (key, data) in enumerate(texts.items()):
                seal = f"{len(data)}-{crc32c(data)}"
                if (key, seal) not in self._there:
                    (Path(folder) / str(number)).write_bytes(data)
                    puts.append(Put(key, str(Path(folder) / str(number)), seal))
            self._send(puts, 0)

    def _send(self, puts: Iterable[Put], count: int) -> None:
        for answer in self._connection.run(puts):
            if answer.error:
                raise self._connection.problem(answer)
            assert isinstance(answer.request, Put)
            self._there.add((answer.request.key, answer.request.seal))
            self.bytes += answer.found["sent"]
            if count:
                self._progress(1, count)


def _take(connection: Connection, path: Path, items: Sequence[Item], progress: Progress) -> int:
    """Read files that are not here yet; each is looked at before it gets its name."""
    done, folders = 0, set()
    for start in range(0, len(items), _TOGETHER):
        some = items[start : start + _TOGETHER]
        missing = {key_of(path, item.path): item for item in some if item.problem(item.path)}
        gets = []
        for key, item in missing.items():
            make_folder(layout.inside(path, item.path.parent))
            temporary = layout.temporary(item.path)
            temporary.write_bytes(b"")
            gets.append(Get(key, str(temporary), item.size, item.most))
        for answer in connection.run(gets):
            item = missing[answer.request.key]
            temporary = layout.temporary(item.path)
            if answer.error:
                raise connection.problem(answer)
            if what := item.problem(temporary):
                where = f"{connection.url}/{answer.request.key}"
                raise CorruptShard(f"{where} is not what was committed ({what}); verify the store that it comes from and upload it again")
            sync_file(temporary)
            temporary.replace(item.path)
            folders.add(item.path.parent)
            done += answer.found["size"]
        progress(len(some), len(items))
    for folder in folders:
        sync_folder(folder)
    return done


def _weights(path: Path, manifest: Manifest) -> Iterator[Item]:
    for name, info in manifest.passes.items():
        yield from inventory.static_items(path, name, info)


def _models(sending: _Sending, path: Path, manifest: Manifest) -> dict[str, bytes]:
    """Send what ships with each pass; the lists of it."""
    texts = {}
    for name in manifest.passes:
        if layout.model(path, name).is_dir():
            texts[key_of(path, inventory.listing(path, name))] = inventory.listing_bytes(path, name)
    with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
        for name, key in ((name, key_of(path, inventory.listing(path, name))) for name in manifest.passes):
            if key in texts:
                (Path(folder) / name).write_bytes(texts[key])
                sending.files(inventory.listed_items(path, name, Path(folder) / name))
    return texts


def _shipped(connection: Connection, kept: Path, path: Path, name: str) -> list[Item]:
    """What ships with a pass, by the list of it that is read into ``kept``."""
    item = inventory.listing_item(kept, name)
    make_folder(item.path.parent)
    item.path.write_bytes(b"")
    (answer,) = connection.run([Get(key_of(kept, item.path), str(item.path), None, item.most)])
    if answer.error == "missing":
        return []
    if answer.error:
        raise connection.problem(answer)
    return inventory.listed_items(path, name, item.path)


def _state(connection: Connection) -> tuple[Manifest | None, Committed | None, int]:
    """Manifest and commits that are there, None without a store, and the generation of commit logs."""
    with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
        there = read_metadata(connection, Path(folder))
        generation = lines.generation(Path(folder))
        return (read_manifest(Path(folder)), commits.replay(Path(folder)), generation) if there else (None, None, generation)


def _seals(committed: Committed) -> dict[tuple[str, int], dict[str, Seal]]:
    return {(commit.pass_name, commit.shard): commit.files for commit in _all(committed)}


def _begin(url: str, path: Path, manifest: Manifest, committed: Committed) -> None:
    """Prepare the folder ``path``; raises where it is not one to copy the store into."""
    if layout.manifest(path).exists():
        if other := _other(read_manifest(path), manifest):
            raise FingerprintMismatch(f"{path} holds another store than {url}: {other}; give another folder")
        for name, shards in commits.replay(path).items():
            if own := [shard for shard, commit in shards.items() if not _equal(committed.get(name, {}).get(shard), commit)]:
                raise FingerprintMismatch(f"{path} has shards {own[:5]} of pass {name} that {url} lacks; give another folder")
        return
    if path.exists() and not (path / COMING).exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(f"expected an empty folder or a copy of {url} at {path}, found something else; give another folder")
    make_folder(path)
    replace(path / COMING, url.encode())


def _equal(commit: Commit | None, other: Commit) -> bool:
    return commit is not None and commit.files == other.files


def _other(old: Manifest, new: Manifest) -> str | None:
    """In what ``new`` is another store than ``old``; None where it is a later state of it."""
    for name, crcs in old.rows.slot_crcs.items():
        if new.rows.slot_crcs.get(name, ())[: len(crcs)] != crcs:
            return "its rows are others"
    for name in old.passes.keys() & new.passes.keys():
        for field in _IDENTITY:
            if getattr(old.passes[name], field) != getattr(new.passes[name], field):
                return f"pass {name} has another {field}"
    return None


def _check_schema(where: Path | str, manifest: Manifest) -> None:
    if manifest.schema_version != SCHEMA:
        raise StoreError(
            f"{where} has schema version {manifest.schema_version}; object storage takes {SCHEMA}: write it anew with teacher-dump copy"
        )


def _connection(url: str) -> Connection:
    if (address := url_of(url)) is None:
        raise ValueError(f"expected an address such as s3://bucket/folder/store, found {url}")
    return Connection(address)


def _all(committed: Committed) -> list[Commit]:
    return [commit for shards in committed.values() for commit in shards.values()]
