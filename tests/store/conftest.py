"""Lets the tests of the store share ``small_store.py`` and ``object_storage.py``."""

import copy
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harm import good_store
from object_storage import Proxy, environment, new_url, put, s3_server, ship
from small_store import GROUPS, Made, make_store


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_store(tmp_path_factory.mktemp("template") / "store", GROUPS)


@pytest.fixture
def made(_template: Made, tmp_path: Path) -> Made:
    """A small store with a complete pass, to do with as one likes."""
    shutil.copytree(_template.path, tmp_path / "store")
    return Made(tmp_path / "store", _template.rows, copy.deepcopy(_template.values))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return good_store(tmp_path_factory.mktemp("good") / "store")


@pytest.fixture
def path(good: Made, tmp_path: Path) -> Path:
    """A good store to do harm to."""
    return shutil.copytree(good.path, tmp_path / "store")


@pytest.fixture(scope="session")
def s3() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(s3: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """A way to the server that all connections of the test take."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    proxy = Proxy(s3)
    for name, value in environment(proxy.port, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()


@pytest.fixture
def url(proxy: Proxy) -> str:
    return new_url(proxy.server)


@pytest.fixture(scope="session")
def _published(_template: Made, s3: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, str]:
    """A store, and the address that it was uploaded to."""
    path = tmp_path_factory.mktemp("published") / "store"
    shutil.copytree(_template.path, path)
    ship(path)
    url = new_url(s3)
    put(path, url, s3)
    return Made(path, _template.rows, _template.values), url


@pytest.fixture
def local(_published: tuple[Made, str], proxy: Proxy) -> Made:
    """A store that no test may change."""
    return _published[0]


@pytest.fixture
def there(_published: tuple[Made, str]) -> str:
    """The address of ``local`` in object storage."""
    return _published[1]


@pytest.fixture
def own(made: Made) -> Made:
    """A store of the test's own."""
    ship(made.path)
    return made


@pytest.fixture
def own_there(own: Made, url: str, s3: int) -> str:
    """The address of ``own`` in object storage."""
    put(own.path, url, s3)
    return url
