"""Lets the tests of the store share ``small_store.py``."""

import copy
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_store import GROUPS, Made, make_store


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_store(tmp_path_factory.mktemp("template") / "store", GROUPS)


@pytest.fixture
def made(_template: Made, tmp_path: Path) -> Made:
    """A small store with a complete pass, to do with as one likes."""
    shutil.copytree(_template.path, tmp_path / "store")
    return Made(tmp_path / "store", _template.rows, copy.deepcopy(_template.values))
