"""Where a sweep's study lies: Optuna's storages, opened and failing in our words."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from student_train.sweep import Sweep
from student_train.trial import turn

JOURNAL = "study.log"


@contextmanager
def opened(sweep: Sweep) -> Iterator[BaseStorage]:
    """The storage of ``sweep``: its database, or a journal in its folder.

    Optuna's warnings go where this program's messages go; what it says of its own work is left out, since the sweep says it.

    Raises:
        ValueError: it can't be opened or read, here or within the ``with``; passwords are left out of the message.
    """
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(logging.WARNING)
    url = sweep.database()
    # of an absolute path; and a lock that is a file, which NFS (from version 3) makes for one machine alone
    file = str((sweep.output / JOURNAL).absolute())
    if url is None:
        where, hint = file, f"remove {file}, and start the sweep again: it finds what was done in its folders"
    else:
        where, hint = f"storage: {_shown(url)}", "what was done is safe in the sweep's folders: mend it, and start the sweep again"
    try:
        with turn(sweep):  # tables are made once
            storage = JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file))) if url is None else RDBStorage(url)
    except (OptunaError, SQLAlchemyError, ImportError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise ValueError(f"{where}: {_first_line(error)}; {hint}") from None
    try:
        yield storage
    except (OptunaError, SQLAlchemyError) as error:
        raise ValueError(f"{where}: {_first_line(error)}; {hint}") from None
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def _first_line(error: Exception) -> str:
    """What a driver said, without the statement that it said it of."""
    cause = error.__cause__ or error
    return str(getattr(cause, "orig", cause)).strip().partition("\n")[0] or type(cause).__name__


def _shown(url: str) -> str:
    """The address without its password."""
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "its address"
