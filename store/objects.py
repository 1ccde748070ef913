"""The process that talks to object storage for another one: requests on standard input, answers on standard output.

It is a process of its own because obstore's threads do not live on in a forked child (the next call there waits for ever),
and data loaders fork. Run as a file, without the rest of the package, it starts fast and stays small.

Lines of JSON. The first one in is ``{"url", "seconds", "allow_http"}``. Requests are ``{"id", "do", "key", ...}`` and each is
answered by ``{"id", "error", "text", ...}``, in the order they are done; ``error`` is empty or one of

- ``missing``: there is no such object (or bucket); ``denied``: credentials are missing or not enough; ``plain``: http is not allowed
- ``size``: the object has another size (``found``) than it must have
- ``refused``: the storage does not take such a request; ``failed``: it did not answer in time, however often it was asked
- ``disk``: a file here cannot be read or written.
"""

import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import obstore
from obstore import exceptions
from obstore.store import from_url

PIECE = 8 << 20
"""Bytes of one range read."""
WHOLE = 64 << 20
"""Files up to this size are sent in one request, which can be conditional; larger ones in parts."""
SMALL = 256 << 10
"""Files up to this size are sent without asking first whether they are there."""
READS, WRITES = 16, 4
"""Requests at a time."""
ATTEMPTS = 4
"""One attempt may take this fraction of the time for all."""

Json = dict[str, Any]
T = TypeVar("T")

_FINAL = (
    FileNotFoundError,
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.AlreadyExistsError,
    exceptions.NotModifiedError,
    exceptions.NotSupportedError,
    exceptions.InvalidPathError,
    exceptions.UnknownConfigurationKeyError,
)
_STATUS = re.compile(r"non-2xx status code: (\d+)")
_AGAIN = {408, 409, 425, 429}
_IDENTITY = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""Where clouds hand out credentials: who has none ends up there."""


class WrongSize(Exception):
    """The object has another size than it must have."""

    def __init__(self, found: int) -> None:
        super().__init__(found)
        self.found = found


class Objects:
    """The objects under one URL."""

    def __init__(self, url: str, seconds: float, allow_http: bool) -> None:
        self._seconds = seconds
        attempt = timedelta(seconds=seconds / ATTEMPTS)
        self._store = from_url(
            url,
            client_options={"timeout": attempt, "connect_timeout": min(attempt, timedelta(seconds=5)), "allow_http": allow_http},
            retry_config={"max_retries": 3, "retry_timeout": attempt, "backoff": {"max_backoff": min(attempt, timedelta(seconds=2))}},
        )
        self._reads, self._writes = asyncio.Semaphore(READS), asyncio.Semaphore(WRITES)

    async def get(self, key: str, path: str, size: int | None, most: int, unless: str | None) -> Json:
        """Put the object into the file ``path``, which exists: ``size`` bytes (at most ``most`` where that is None).

        An object whose tag is ``unless`` is not read again.
        """
        found: Json = {"size": size, "e_tag": None, "same": False}
        if size is None or size <= PIECE:
            found, data = await self._tried(lambda: self._small(key, size, most, unless))
            if data is not None:
                Path(path).write_bytes(data)
            if data is not None or found["same"]:
                return found
        with Path(path).open("r+b") as file:
            file.truncate(found["size"])
            async with asyncio.TaskGroup() as group:
                for start in range(0, found["size"], PIECE):
                    group.create_task(self._piece(key, file.fileno(), start, found["size"]))
        return found

    async def _small(self, key: str, size: int | None, most: int, unless: str | None) -> tuple[Json, obstore.Bytes | None]:
        """What an object is, and its bytes if they are few."""
        async with self._reads:
            try:
                result = await obstore.get_async(self._store, key, options={"if_none_match": unless} if unless else None)
            except exceptions.NotModifiedError:
                return {"size": 0, "e_tag": unless, "same": True}, None
            found = result.meta["size"]
            if (size is not None and found != size) or (size is None and found > most):
                raise WrongSize(found)
            about = {"size": found, "e_tag": result.meta["e_tag"], "same": False}
            return about, _whole(await result.bytes_async(), found) if found <= PIECE else None

    async def _piece(self, key: str, file: int, start: int, size: int) -> None:
        """Write one range of an object to its place in ``file``."""
        stop = min(start + PIECE, size)

        async def read() -> obstore.Bytes:
            async with self._reads:
                result = await obstore.get_async(self._store, key, options={"range": (start, stop)})
                if result.meta["size"] != size:
                    raise WrongSize(result.meta["size"])
                return _whole(await result.bytes_async(), stop - start)

        data = await self._tried(read)
        if os.pwrite(file, data, start) != len(data):
            raise OSError("no room on the disk")

    async def put(self, key: str, path: str, seal: str) -> Json:
        """Make the file ``path`` the object ``key``, marked with ``seal``; nothing is sent where one with that seal is."""
        async with self._writes:
            size = Path(path).stat().st_size
            there = None if size <= SMALL else await self._seal(key)
            if there == seal:
                return {"sent": 0}
            if there is None and size <= WHOLE:
                try:
                    await self._tried(lambda: self._send(key, path, size, seal, "create"))
                    return {"sent": size}
                except exceptions.AlreadyExistsError:  # also where an attempt went through and its answer was lost
                    if await self._seal(key) == seal:
                        return {"sent": 0}
                except exceptions.NotSupportedError:
                    pass  # a storage without conditional requests
            seconds = self._seconds * max(1, size / WHOLE)
            await self._tried(lambda: self._send(key, path, size, seal, "overwrite"), seconds)
            return {"sent": size}

    async def _send(self, key: str, path: str, size: int, seal: str, mode: Literal["create", "overwrite"]) -> None:
        parts = size > WHOLE
        file = Path(path) if parts else Path(path).read_bytes()
        await obstore.put_async(
            self._store, key, file, attributes={"seal": seal}, mode=mode, use_multipart=parts, chunk_size=PIECE, max_concurrency=READS
        )

    async def _seal(self, key: str) -> str | None:
        """What an object is marked with; None where there is none."""
        try:
            result = await self._tried(lambda: obstore.get_async(self._store, key, options={"head": True}))
        except FileNotFoundError:
            return None
        return str(result.attributes.get("seal", ""))

    async def _tried(self, attempt: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """What ``attempt`` gives, tried again with growing pauses until all time is up: obstore itself gives up on a body cut short."""
        end, pause = time.monotonic() + (seconds or self._seconds), 0.1
        while True:
            try:
                return await asyncio.wait_for(attempt(), max(0.1, end - time.monotonic()))
            except (exceptions.BaseError, OSError, TimeoutError) as error:
                if isinstance(error, _FINAL) or _kind(error) != "failed" or time.monotonic() + pause > end:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, 5.0)


def _whole(data: obstore.Bytes, size: int) -> obstore.Bytes:
    if len(data) != size:
        raise OSError(f"the answer was cut short: {len(data)} of {size} bytes")
    return data


def _kind(error: BaseException) -> str:
    text = str(error)
    status = _STATUS.search(text)
    if any(address in text for address in _IDENTITY) or isinstance(
        error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
    ):
        return "denied"
    if isinstance(error, OSError) and error.errno:
        return "disk"
    if isinstance(error, FileNotFoundError):
        return "missing"
    if "builder error" in text:
        return "plain"
    if isinstance(error, ValueError | TypeError) or (status and 300 <= int(status[1]) < 500 and int(status[1]) not in _AGAIN):
        return "refused"
    return "failed"


async def _answer(objects: Objects, request: Json) -> None:
    number, do = request.pop("id"), request.pop("do")
    try:
        more = await (objects.get(**request) if do == "get" else objects.put(**request))
        _say({"id": number, "error": "", **more})
    except BaseException as error:  # every request is answered, whatever happens
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, WrongSize):
            _say({"id": number, "error": "size", "text": "", "found": error.found})
        else:
            _say({"id": number, "error": _kind(error), "text": f"{error}" or type(error).__name__})


def _say(answer: Json) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def _serve() -> None:
    requests = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()
    objects: Objects | None = None
    while line := await requests.readline():
        request = json.loads(line)
        if objects is None:
            try:
                objects = Objects(**request)
                _say({"error": "", "text": ""})
            except Exception as error:  # whatever obstore makes of an address and the environment
                _say({"error": _kind(error), "text": str(error)})
            continue
        task = asyncio.create_task(_answer(objects, request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    os._exit(0)  # who asked has gone: nobody waits for what is under way


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    asyncio.run(_serve())
