"""What kind of file system a path lies on."""

import os
from pathlib import Path

_DISTRIBUTED = ("nfs", "nfs3", "nfs4", "cifs", "smb", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs")
NETWORK = frozenset({*_DISTRIBUTED, "orangefs", "pvfs2", "panfs", "9p", "virtiofs", "fuse"})
"""File systems on which another machine can take a file away under a reader."""

MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux says what is mounted (proc_pid_mountinfo(5))."""


def is_network(path: Path, mounts: Path = MOUNTS) -> bool:
    """Whether ``path`` lies on a network file system (or one in user space); False where ``mounts`` does not tell."""
    kind = _kind(path, mounts)
    return kind in NETWORK or kind.startswith("fuse.")


def _kind(path: Path, mounts: Path) -> str:
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    resolved = os.fsencode(path.resolve())
    best, kind = -1, ""
    for line in lines:
        mounted, _, about = line.partition(" - ")
        place = mounted.split(" ")[4].encode().decode("unicode_escape").encode("latin-1")
        inside = resolved == place or resolved.startswith(place.rstrip(b"/") + b"/")
        if inside and len(place) >= best:  # of mounts at one place the last one counts
            best, kind = len(place), about.split(" ")[0]
    return kind
