"""Methods against the same student without a teacher, on real data: one dump, then every phase of a recipe for each seed.

    python benchmarks/methods.py sst2 --data FOLDER [--seeds 0 1] > benchmarks/results/sst2.json

FOLDER holds ``data/`` and ``teachers/`` as recipes/NAME/dump.yaml names them. The JSON has each student's held-out scores
before and after training, and the size of the store; the README's tables are made of it.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from store.reader import Store

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["sst2", "wikipedia"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    work = ROOT / "out" / "methods" / options.name
    work.mkdir(parents=True, exist_ok=True)
    for folder in ("data", "teachers"):
        link = work / folder
        link.unlink(missing_ok=True)
        link.symlink_to((options.data / folder).resolve())
    recipes = ROOT / "recipes" / options.name
    _program(work, "teacher-dump", "run", str(recipes / "dump.yaml"))
    (work / "teachers").unlink()  # training has no teacher
    runs = {}
    for seed in options.seeds:
        output = f"out/{options.name}/students-{seed}"
        _program(work, "student-train", "run", str(recipes / "train.yaml"), f"seed={seed}", f"output={output}")
        runs[str(seed)] = _phases(work / output)
    store = Store.open(work / "out" / options.name / "features")
    name = next(iter(store.manifest.passes))
    stored = sum(seal.size for commit in store.committed(name).values() for seal in commit.files.values())
    figures = {
        "recipe": options.name,
        "commit": commit,
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "store": {
            "rows": store.manifest.rows.rows,
            "tokens": store.manifest.rows.tokens,
            "feature_bytes": stored,
            "bytes_per_token": round(stored / store.manifest.rows.tokens, 1),
        },
        "runs": runs,
    }
    print(json.dumps(figures, indent=1))


def _program(work: Path, name: str, *arguments: str) -> None:
    """Run one of the programs in ``work``; a run that was interrupted goes on."""
    command = [str(Path(sys.executable).parent / name), *arguments]
    subprocess.run(command, cwd=work, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr, check=True)


def _phases(output: Path) -> dict[str, dict[str, object]]:
    """Scores of each phase's student."""
    results = {file.parent.name: json.loads(file.read_text()) for file in sorted(output.glob("*/result.json"))}
    return {name: {kind: result[kind] for kind in ("steps", "before", "after")} for name, result in results.items()}


if __name__ == "__main__":
    main()
