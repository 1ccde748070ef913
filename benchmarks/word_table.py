"""The table and the figure of word_predictions.py, from its JSON: Markdown on standard output, the figure beside the JSON.

python benchmarks/word_table.py [benchmarks/results/word_predictions.json]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMNS = ("bytes", "error", "token_error", "angle", "norm", "batch_error", "mean_error", "kl")
KINDS = {
    "what the head takes in": "head_input",
    "likeliest words and bands": "band",
    "RS-KD (17-bit words, 7-bit counts)": "RS-KD",
    "words drawn at random": "draw",
    "Megatron-LM, no tail": "Megatron-LM top .*no tail",
    "Megatron-LM, ghost": "Megatron-LM",
    "DistillKit, no tail": "DistillKit.*normalize_t, no tail",
    "DistillKit, ghost": "DistillKit.*normalize_t, ghost",
    "likeliest words": "top",
}
"""Forms that belong together: the first whose pattern is in a form's name. DistillKit's are drawn with the better of its two settings."""


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
    """Errors over bytes, of tokens by themselves on the left, of batches on the right; a row for each student."""
    students = figures["students"]
    drawing = Figure(figsize=(11, 4.2 * len(students)), layout="constrained")
    axes = drawing.subplots(len(students), 2, squeeze=False)
    for (student, forms), pair in zip(students.items(), axes, strict=True):
        for score, axis in zip(("error", "batch_error"), pair, strict=True):
            for label, points in grouped(forms).items():
                shown = sorted((row["bytes"], row[score]) for row in points if row[score] > 0)
                axis.loglog(*zip(*shown, strict=True), "o-", label=label, markersize=4, linewidth=1)
            axis.set_xticks([36, 110, 300, 768], ["36", "110", "300", "768"])
            axis.set_xticks([], minor=True)
            axis.set(xlabel="bytes a token", ylabel=score.replace("_", " "), title=Path(student).name)
            axis.grid(alpha=0.3)
    axes[0][1].legend(fontsize=7)
    return drawing


def grouped(forms: dict[str, dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Forms by their kind."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, row in forms.items():
        kind = next((label for label, pattern in KINDS.items() if re.search(pattern, name)), None)
        if kind is not None:
            found.setdefault(kind, []).append(row)
    return found


def main() -> None:
    """Print the table and draw the figure."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/word_predictions.json")
    figures = json.loads(path.read_text())
    print(table(figures))
    figure(figures).savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
