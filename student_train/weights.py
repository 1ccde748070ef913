"""How large a student is, from the files of its weights."""

from math import prod
from pathlib import Path

from safetensors import safe_open


def count_weights(student: Path) -> int:
    """Numbers in the weight files of a folder; 0 where there are none."""
    total = 0
    for path in sorted(student.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def weight_bytes(student: Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(path.stat().st_size for path in student.glob("*.safetensors"))
