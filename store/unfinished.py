"""A folder on its way to being a store: which command makes it, and what a build that was cut short has left there."""

import re
from pathlib import Path

from store import layout
from store.errors import StoreError
from store.manifest import begun
from store.publish import make_folder, replace
from store.rows import ROW_ARRAYS, TOKEN_ARRAYS


def claim(path: Path, job: str) -> None:
    """Make ``path`` a folder that is being built by ``job``, or refuse it untouched."""
    if layout.manifest(path).exists():
        raise StoreError(f"{path} already holds a finished store; give another folder, or remove this one to build its rows anew")
    if path.exists() and not path.is_dir():
        raise StoreError(f"expected a folder for the store, found a file: {path}")
    marker = layout.building(path)
    found = set(path.iterdir()) if path.exists() else set()
    if found - {layout.temporary(marker)} and not marker.exists():  # in this order: a process that does the same puts it there first
        kind = "a Python package" if (path / "__init__.py").exists() else "something else"
        raise StoreError(
            f"expected an empty or new folder for the store, but {path} holds {kind}; nothing was touched, give another folder"
        )
    if marker.exists() and (other := begun(path)) != job:
        other = other or "teacher-dump run"
        raise StoreError(f"{path} is being made by `{other}`, which was cut short; run that again, or remove the folder")
    try:
        make_folder(path)
        if not marker.exists():
            replace(marker, job.encode())
    except StoreError:
        if not marker.exists():  # or a process that does the same was quicker
            raise
    except OSError as error:
        raise StoreError(f"cannot make the store {path}: {error.strerror}; give a folder that can be written") from error


def clear(path: Path) -> None:
    """Remove what an unfinished build left, and nothing else."""
    slots = r"zarr\.json|c\.\d+(\.0)?|\.(zarr\.json|c\.\d+(\.0)?)\.0\.tmp"
    ours = {
        **{layout.rows_array(path, name): slots for name in ROW_ARRAYS},
        path / "rows": r"part-\d{5,}\.parquet|zarr\.json|\.zarr\.json\.0\.tmp",
        **{layout.tokens(path, name): slots for name in TOKEN_ARRAYS},
        path / "tokens": r"zarr\.json|\.zarr\.json\.0\.tmp",
    }
    for folder, names in ours.items():
        if layout.inside(path, folder).is_dir():
            for file in folder.iterdir():
                if not re.fullmatch(names, file.name):
                    raise StoreError(
                        f"{path} holds an unfinished build and {file}, which is not part of it; move that away and start again"
                    )
                file.unlink()
            folder.rmdir()
    for file in (path / "zarr.json", layout.temporary(path / "zarr.json"), layout.temporary(layout.manifest(path))):
        file.unlink(missing_ok=True)
