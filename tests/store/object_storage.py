"""A real S3 server on loopback, and a proxy in front of it that breaks answers as tests ask for."""

import contextlib
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from store import FeatureKey, Store, cache, layout, remote
from store.remote import Connection, Put
from store.transfer import upload

Fault = Callable[[str, str, int], str | None]
"""(method, key, how often it was asked for before) -> None or one of 500, 503, 403, cut, slow, hang, close."""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that has no buckets yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield port
        finally:
            server.kill()


def make_bucket(port: int, name: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT"), timeout=30).close()


class Proxy:
    """Passes requests on to a server, one after the other on each connection, unless ``fault`` says otherwise."""

    def __init__(self, server: int) -> None:
        self.server = server
        self.fault: Fault = lambda method, key, before: None
        self.asked: Counter[tuple[str, str]] = Counter()
        """(method, key) -> how often."""
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._socket.getsockname()[1])
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._socket.close()

    def gets(self, ending: str = "") -> int:
        """How many objects were read whose key ends so."""
        return sum(number for (method, key), number in self.asked.items() if method == "GET" and key.endswith(ending))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), client, client.makefile("rb") as coming:
            while head := _head(coming):
                method, path, _ = head[0].decode().split(" ", 2)
                body = coming.read(_length(head))
                key = path.partition("?")[0].split("/", 2)[-1]
                with self._lock:
                    before = self.asked[method, key]
                    self.asked[method, key] += 1
                if not self._answer(client, head, body, method, self.fault(method, key, before)):
                    return

    def _answer(self, client: socket.socket, head: list[bytes], body: bytes, method: str, fault: str | None) -> bool:
        """Whether the connection goes on."""
        if fault == "hang":
            self._ended.wait(60)
            return False
        if fault == "close":
            return False
        if fault in ("403", "500", "503"):
            error = b"<Error><Code>%s</Code></Error>" % {"403": b"AccessDenied", "500": b"InternalError", "503": b"SlowDown"}[fault]
            client.sendall(b"HTTP/1.1 %s Error\r\nContent-Length: %d\r\n\r\n" % (fault.encode(), len(error)))
            if method != "HEAD":
                client.sendall(error)
            return True
        with socket.create_connection(("127.0.0.1", self.server), 30) as server:
            kept = [line for line in head if not line.lower().startswith(b"connection:")]
            server.sendall(b"\r\n".join([*kept, b"Connection: close", b"", body]))
            with server.makefile("rb") as answer:
                said = _head(answer)
                data = b"" if method == "HEAD" else answer.read()
        kept = [line for line in said if not line.lower().startswith(b"connection:")]
        if fault == "cut":
            client.sendall(b"\r\n".join([*kept, b"", data[: len(data) // 2]]))
            return False
        client.sendall(b"\r\n".join([*kept, b"", b""]))
        pieces = 4 if fault == "slow" else 1
        for piece in range(pieces):
            client.sendall(data[len(data) * piece // pieces : len(data) * (piece + 1) // pieces])
            time.sleep(0.02 if fault == "slow" else 0)
        return True


def _head(coming: object) -> list[bytes]:
    lines = []
    while line := coming.readline().rstrip(b"\r\n"):  # type: ignore[attr-defined]
        lines.append(line)
    return lines


def _length(head: list[bytes]) -> int:
    found = re.search(rb"content-length: *(\d+)", b"\n".join(head).lower())
    return int(found[1]) if found else 0


_NUMBERS = itertools.count()


def quiet(done: int, total: int) -> None:
    """No progress bar."""


def environment(port: int, folder: Path) -> dict[str, str]:
    """What a process needs to reach the server at ``port``."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        cache.FOLDER: str(folder),
        remote.SECONDS: "20",
    }


def new_url(s3: int) -> str:
    """An address with nothing there yet."""
    bucket = f"bucket-{next(_NUMBERS)}"
    make_bucket(s3, bucket)
    return f"s3://{bucket}/stores/one"


def put(path: Path, url: str, s3: int) -> None:
    """Upload, and not by way of the proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3, path.parent / "cache").items():
            patch.setenv(name, value)
        upload(path, url, quiet)


def keys_of(store: Store, pass_name: str = "bert") -> list[FeatureKey]:
    return [spec.feature.of(pass_name) for spec in store.manifest.passes[pass_name].features]


def check_same(store: Store, local: Store, rows: np.ndarray | None = None, pass_name: str = "bert") -> None:
    """Every bit that ``store`` reads is that of ``local``."""
    rows = np.random.default_rng(0).permutation(len(local.rows)) if rows is None else rows
    keys = keys_of(local, pass_name)
    found, wanted = store.read_all(keys, rows), local.read_all(keys, rows)
    for key in keys:
        for name, values in wanted[key].items():
            assert found[key][name].tobytes() == values.tobytes()
    for array in local.manifest.rows.token_arrays:
        assert np.array_equal(store.tokens(array.name, rows), local.tokens(array.name, rows))
    assert np.array_equal(store.rows.label_at(rows), local.rows.label_at(rows), equal_nan=True)


def objects_as(path: Path, of: Path) -> bool:
    """Whether two folders hold the same files, locks and commit logs aside."""

    def files(folder: Path) -> dict[str, bytes]:
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return {name: data for name, data in found.items() if not name.startswith(("commits/", "claims/"))}

    return files(path) == files(of)


def process(code: str, *arguments: object) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def replace_object(url: str, key: str, data: bytes) -> None:
    """Replace an object."""
    file = Path(os.environ[cache.FOLDER]).parent / "object"
    file.write_bytes(data)
    (answer,) = Connection(url).run([Put(key, str(file), f"{random.random()}")])
    assert not answer.error, answer


def ship(path: Path) -> None:
    """Put a teacher's folder, or what stands for one, into a store."""
    model = layout.model(path, "bert")
    (model / "words").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "words" / "vocab.txt").write_text("a\nb\n")
