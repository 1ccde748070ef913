"""How an output was made: the command, what it ran on, and when."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from store.manifest import Provenance

PACKAGES = ("teachercache", "torch", "transformers", "tokenizers", "numpy", "zarr", "pyarrow")


def provenance(command: Sequence[str]) -> Provenance:
    """The record of ``command`` run now."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            versions[package] = "unknown"
    return Provenance(command=tuple(command), versions=versions, created=datetime.now(UTC).isoformat(timespec="seconds"))
