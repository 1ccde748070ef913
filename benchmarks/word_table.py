"""The table and the figure of word_predictions.py, from its JSON: Markdown on standard output, the figure beside the JSON.

python benchmarks/word_table.py [benchmarks/results/word_predictions.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMNS = ("bytes", "error", "token_error", "angle", "norm", "batch_error", "mean_error", "kl")
KINDS = {
    "head_input": "#888888",
    "band": "#d62728",
    "draw": "#1f77b4",
    "RS-KD": "#17becf",
    "top": "#2ca02c",
    "Megatron": "#9467bd",
    "DistillKit": "#ff7f0e",
}
"""A part of a form's name, the first that fits, and its colour."""


def table(figures: dict[str, Any]) -> str:
    """Markdown, a table for each student."""
    lines = []
    for student, forms in figures["students"].items():
        lines += [f"\n{Path(student).name}\n", f"| form | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name, row in sorted(forms.items(), key=lambda item: item[1]["bytes"]):
            cells = [f"{row[column]:.3g}" if column in row else "" for column in COLUMNS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(figures: dict[str, Any]) -> Figure:
    """Errors over bytes, tokens by themselves on the left, batches on the right; a row for each student."""
    students = figures["students"]
    drawing = Figure(figsize=(11, 4.2 * len(students)), layout="constrained")
    axes = drawing.subplots(len(students), 2, squeeze=False)
    for (student, forms), pair in zip(students.items(), axes, strict=True):
        for score, axis in zip(("error", "batch_error"), pair, strict=True):
            for name, row in forms.items():
                kind = next(part for part in KINDS if part in name)
                if row[score] > 0 and "no tail" not in name:
                    axis.loglog(row["bytes"], row[score], "o", color=KINDS[kind])
                    axis.annotate(name.partition(",")[0].removesuffix(" exact 1"), (row["bytes"], row[score]), fontsize=6, rotation=20)
            axis.set(xlabel="bytes a token", ylabel=score.replace("_", " "), title=Path(student).name)
            axis.grid(alpha=0.3)
    return drawing


def main() -> None:
    """Print the table and draw the figure."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/word_predictions.json")
    figures = json.loads(path.read_text())
    print(table(figures))
    figure(figures).savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
