"""The folder of a teacher that ships with a pass: configuration, tokenizer, blocks to start students from.

Other libraries open what lies there, so it is looked over before they do.
"""

import os
import stat
from pathlib import Path

from store import layout
from store.errors import CorruptShard

CONFIGURATION = "config.json"


def shipped(store: Path, pass_name: str, configured: bool = True) -> Path:
    """The folder, with nothing in it but plain files and folders; that of imported answers is not ``configured``.

    Raises:
        CorruptShard: it is missing, or holds links, pipes or devices.
    """
    folder = layout.inside(store, layout.model(store, pass_name))
    if what := shipped_problem(store, pass_name, configured):
        raise CorruptShard(f"{folder}: {what}; remove the folder and start the dump again: it ships it anew")
    return folder


def shipped_problem(store: Path, pass_name: str, configured: bool = True) -> str | None:
    """What is wrong with the folder; None if nothing."""
    folder = layout.inside(store, layout.model(store, pass_name))
    if configured and not (folder / CONFIGURATION).is_file():
        return "the teacher's configuration and tokenizer are missing"
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = (Path(parent) / name).lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                return f"expected plain files, but {Path(parent, name).relative_to(folder)} is none"
    return None
