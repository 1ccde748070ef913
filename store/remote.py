"""Object storage: addresses, and one connection to what lies under an address (S3, Google Cloud, Azure, plain HTTP).

Credentials and endpoints come from the environment alone, in the variables that each cloud's own tools use: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (any S3-compatible server), GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY and so on; AWS_ALLOW_HTTP=true (AZURE_..., GOOGLE_...) allows an endpoint without TLS.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from store import layout
from store.errors import StoreError

SECONDS = "TEACHERCACHE_REMOTE_SECONDS"
"""Environment variable: how long a request is tried again before it counts as failed."""
_SECONDS = 120.0

IN_FLIGHT = 64
"""Requests that may be on their way at a time."""

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
_URL = re.compile(rf"({'|'.join(_SCHEMES)}):/{{1,2}}([^/].*)")
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
_TEXT = 300
"""Letters of what the storage said that are shown."""


def url_of(place: Path | str) -> str | None:
    """The address that ``place`` is, None for a folder of this machine.

    A ``Path`` may hold one: the slash that ``Path("s3://bucket/store")`` drops is put back.

    Raises:
        StoreError: it is an address that no store can have.
    """
    if (found := _URL.fullmatch(str(place))) is None:
        return None
    scheme, rest = found[1], found[2].rstrip("/")
    account = scheme in ("abfs", "abfss")  # abfss://container@account...
    if re.search(r"[?#\s]", rest) or ("@" in rest and not account) or any(part in ("", ".", "..") for part in rest.split("/")):
        raise StoreError(
            f"expected an address such as s3://bucket/folder/store, found {place}; credentials come from the environment alone"
        )
    return f"{scheme}://{rest}"


def local(path: Path) -> Path:
    """``path``, a folder of this machine; raises a StoreError where it is an address."""
    if url := url_of(path):
        raise StoreError(
            f"{url}: expected a folder of this machine; stores are made and changed in one, "
            "go to object storage with `teacher-dump upload`, and come back with `teacher-dump download`"
        )
    return path


@dataclass(frozen=True)
class Get:
    """Read an object into the file ``path``, which exists."""

    do: ClassVar = "get"
    key: str
    path: str
    size: int | None
    """Bytes it must have; None: as many as it has, but no more than ``most``."""
    most: int = 0
    unless: str | None = None
    """Tag of what is here already: an object with that tag is not read again (``same`` in the answer)."""


@dataclass(frozen=True)
class Put:
    """Make the file ``path`` an object."""

    do: ClassVar = "put"
    key: str
    path: str
    seal: str
    """What it is marked with. An object that is marked so already is not sent again."""


Request = Get | Put


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    request: Request
    error: str
    """Kind of error (store.objects); empty where all went well."""
    text: str
    """What the storage said."""
    found: dict[str, Any]
    """Size and tag of what was read (``size``, ``e_tag``, ``same``), or bytes that were sent (``sent``)."""


class Connection:
    """The objects under ``url``. Safe to fork and to pickle: each process has its own helper, which ends with it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._helper: _Helper | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Connection, (self.url,)

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Do all ``requests``, many at a time; the answers come in the order they are done.

        Raises:
            StoreError: there is no way to talk to the storage at all.
        """
        if self._helper is None or self._helper.owner != os.getpid() or not self._helper.alive:
            self._helper = _Helper(self.url)
        return self._helper.run(requests)

    def problem(self, answer: Answer) -> StoreError:
        """The error of an answer, for people."""
        return _problem(f"{self.url}/{answer.request.key}", answer.error, answer.text, answer.found)


class _Helper:
    """A process that runs store/objects.py for one connection of this one."""

    def __init__(self, url: str) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise StoreError(f"{url}: object storage needs the package obstore; install it with: pip install 'teachercache[remote]'")
        self.owner = os.getpid()
        self.alive = True
        self._url = url
        self._next = 0
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the helper
        command = [sys.executable, "-P", str(Path(__file__).with_name("objects.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: IO[str] = self._process.stdin
        self._from: IO[str] = self._process.stdout
        weakref.finalize(self, _end, self._process, self._words, self.owner)
        allow_http = url.startswith("http://") or any(os.environ.get(name, "").lower() in ("true", "1") for name in _ALLOW_HTTP)
        self._tell({"url": url, "seconds": seconds(), "allow_http": allow_http})
        begun = self._hear()
        if begun["error"]:
            self.alive = False
            known = not re.search("recogni|did not match", begun["text"])
            raise _problem(url, "denied" if known else "refused", begun["text"], {})

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        left, open_ = iter(requests), dict[int, Request]()
        while True:
            while len(open_) < IN_FLIGHT and (request := next(left, None)) is not None:
                self._next += 1
                open_[self._next] = request
                self._tell({"id": self._next, "do": request.do, **asdict(request)})
            if not open_:
                return
            said = self._hear()
            if (done := open_.pop(said.pop("id"), None)) is not None:  # others are of a run that was given up
                yield Answer(done, said.pop("error"), said.pop("text", ""), said)

    def _tell(self, what: dict[str, Any]) -> None:
        try:
            self._to.write(json.dumps(what) + "\n")
            self._to.flush()
        except OSError:
            raise self._gone() from None

    def _hear(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise self._gone()
        heard: dict[str, Any] = json.loads(line)
        return heard

    def _gone(self) -> StoreError:
        self.alive = False
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return StoreError(f"{self._url}: the process that reads it has ended ({lines[-1] if lines else 'killed'}); start again")


def _end(process: "subprocess.Popen[str]", words: IO[bytes], owner: int) -> None:
    """Let a helper end; a forked child only lets go of it."""
    for file in (process.stdin, process.stdout, words):
        if file is not None:
            with contextlib.suppress(OSError):  # what was not said to one that has ended
                file.close()
    if os.getpid() == owner:
        process.wait()
    else:
        process.returncode = 0  # not this process's child


def seconds() -> float:
    """How long a request is tried again before it counts as failed."""
    text = os.environ.get(SECONDS, str(_SECONDS))
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 86400:
        raise StoreError(f"{SECONDS}: expected a number of seconds, found {text!r}")
    return found


def _problem(where: str, error: str, text: str, found: dict[str, Any]) -> StoreError:
    said = re.split(r"\n\s*Debug source", text.strip())[0].removeprefix("Generic ")
    code = re.search(r"<Code>(\w+)</Code>", text)
    said = f"{said.partition('<?xml')[0].strip()} {code[1]}" if code else said
    said = said if len(said) <= _TEXT else said[: _TEXT - 3] + "..."
    cloud = "AWS" if where.startswith("s3") else "GOOGLE" if where.startswith("gs") else "AZURE"
    endpoint = next(
        (f" at {os.environ[name]}" for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT") if where.startswith("s3") and name in os.environ), ""
    )
    if error == "missing":
        what = "no such bucket" if code and code[1] == "NoSuchBucket" else "nothing there"
        return StoreError(f"{where}{endpoint}: {what}; check the address, or put a store there with: teacher-dump upload STORE URL")
    if error == "denied":
        names = {"AWS": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "GOOGLE": "GOOGLE_APPLICATION_CREDENTIALS"}.get(
            cloud, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
        )
        return StoreError(f"{where}{endpoint}: no access ({said}); set credentials in the environment ({names}) that may use this bucket")
    if error == "plain":
        return StoreError(
            f"{where}{endpoint}: without TLS anyone on the way can read and change what is sent; allow it with {cloud}_ALLOW_HTTP=true"
        )
    if error == "size":
        return StoreError(f"{where}: {found.get('found', 0):,} bytes are not what belongs there; upload the store again")
    if error == "disk":
        return StoreError(f"{where}: {said}; make room or rights and start again")
    if error == "refused":
        return StoreError(f"{where}{endpoint}: the storage refuses the request ({said}); check the address and {cloud}_REGION")
    return StoreError(f"{where}{endpoint}: no answer within {seconds():g} s of trying ({said}); check network and endpoint and start again")


def no_store(url: str) -> StoreError:
    """There is no manifest at ``url``."""
    return _problem(url, "missing", "", {})


def key_of(folder: Path, path: Path) -> str:
    """The key of a store's file ``path`` below the address of the store."""
    parts = path.relative_to(folder).parts
    return "/".join(map(layout.safe, parts))
