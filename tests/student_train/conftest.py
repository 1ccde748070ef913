"""What the tests of the trainer share."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from student_train.cli import main


def _module(name: str) -> ModuleType:
    """The script ``name`` beside this file as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return int(code), out, err

    return call


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The script ``tiny_run.py`` as a module."""
    return _module("tiny_run")


@pytest.fixture(scope="session")
def stores() -> ModuleType:
    """The script ``tiny_stores.py`` as a module."""
    return _module("tiny_stores")


@pytest.fixture(scope="session")
def tiny_words() -> ModuleType:
    """The script ``tiny_words.py`` as a module."""
    return _module("tiny_words")


@pytest.fixture(scope="session")
def many_words(tiny_words: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a masked-LM ``teacher`` of 410 words and a ``store`` of masked rows with its word logits in the pass ``tiny``."""
    folder: Path = tmp_path_factory.mktemp("many")
    tiny_words.write_store(folder, ["lm_logits@all"])
    return folder


@pytest.fixture(scope="session")
def tiny_chain() -> ModuleType:
    """The script ``tiny_chain.py`` as a module."""
    return _module("tiny_chain")


@pytest.fixture(scope="session")
def tiny_sweep() -> ModuleType:
    """The script ``tiny_sweep.py`` as a module."""
    return _module("tiny_sweep")


@pytest.fixture(scope="session")
def taught(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 48 rows with the pass ``bert``."""
    path: Path = tmp_path_factory.mktemp("stores") / "taught"
    tiny.write_rows(path)
    tiny.write_teacher(path)
    return path


@pytest.fixture(scope="session")
def untaught(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 32 other rows, without features."""
    path: Path = tmp_path_factory.mktemp("stores") / "untaught"
    tiny.write_rows(path, rows=32, seed=1)
    return path


@pytest.fixture(scope="session")
def sentiment(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of labelled sentences, splits train and dev, with the pass ``tiny`` of a classifier whose folder is gone."""
    folder: Path = tmp_path_factory.mktemp("sentiment")
    path: Path = stores.write_store(folder, "classification", ["task_logits@row", "hidden.2@all", "hidden.4@all"])
    (folder / "teacher").rename(folder / "renamed away")
    return path


@pytest.fixture(scope="session")
def words(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of masked sentences with the pass ``tiny`` of a masked language model, which lies beside it in ``teacher``."""
    features = ["lm_logits@labels", "hidden.4@all", "final@mean"]
    path: Path = stores.write_store(tmp_path_factory.mktemp("words"), "masked_lm", features, objective="mlm")
    return path
