"""The report of runs written by hand: what it says, and that its page, its Markdown and its tables say the same."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from student_train.report.answers import Answers, row_values
from student_train.report.comparisons import compare, comparisons
from student_train.report.leaderboard import leaderboard
from student_train.report.report import write_report
from student_train.report.runs import load
from student_train.report.section import Section, Table
from student_train.report.tables import SCHEMAS, tables

KD, PKD = [0.80, 0.84, 0.83], [0.85, 0.86, 0.90]
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """Its elements, its texts, and whether every element that was opened is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def cells(table: Table, column: str) -> list[str]:
    return [row[table.header.index(column)] for row in table.rows]


def found(section: Section | None, name: str) -> Table:
    assert section is not None
    return next(table for table in section.tables if table.name.startswith(name))


def test_the_leaderboard_has_means_deviations_seeds_sizes_and_cost(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    runs = load([write_sweep(tmp_path / "sweep", {"kd": KD, "pkd": PKD, "rkd": [0.7, None]})])
    section = leaderboard(runs)
    best = found(section, "Best")
    assert cells(best, "method") == ["pkd", "kd", "rkd"]
    # pkd: mean 0.87, deviations -0.02, -0.01, 0.03: sqrt((4 + 1 + 9) / 2) / 100; kd: 0.8233, -0.0233, 0.0167, 0.0067
    assert cells(best, "accuracy") == ["0.8700 ± 0.0265", "0.8233 ± 0.0208", "0.7000"]
    assert cells(best, "seeds") == ["3 of 3", "3 of 3", "1 of 2"]
    assert cells(best, "untrained") == ["0.5000"] * 3
    assert cells(best, "parameters") == ["10"] * 3
    assert cells(best, "time") == ["61 s", "61 s", "60 s"]
    assert cells(best, "start") == ["aaaabbbb"] * 3
    assert "read / row" not in best.header  # older runs have not recorded it
    assert "began with the same weights" in best.note
    assert found(section, "Not finished").rows == (("rkd", "", "1", "open", ""),)


def test_what_training_took_stands_in_the_leaderboard(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{seed}", seed=seed, after={"accuracy": 0.8}) for seed in range(2)]
    for folder, seconds, memory in zip(folders, (100.0, 140.0), (1_000_000_000, 2_000_000_000), strict=True):
        file = folder / "only" / "result.json"
        cost = {"seconds": seconds, "memory": memory, "gpu_memory": None, "feature_bytes": 512.0}
        file.write_text(json.dumps({**json.loads(file.read_text()), "cost": cost}))
    best = found(leaderboard(load(folders)), "Best")
    assert [cells(best, column) for column in ("time", "memory", "read / row")] == [["2.0 min"], ["1.5 GB"], ["512 B"]]


def test_a_pruned_trial_stands_among_those_that_are_not_finished(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", {"kd": [0.8], "pkd": [None]})
    rows = json.loads((folder / "trials.json").read_text())
    rows[1] |= {"state": "pruned", "pruned": 20, "best": 0.61}
    (folder / "trials.json").write_text(json.dumps(rows))
    table = found(leaderboard(load([folder])), "Not finished")
    assert table.rows == (("pkd", "", "0", "pruned", "pruned at step 20, accuracy 0.6100 at best"),)


def test_the_teachers_own_score_is_said(write_run: Callable[..., Path], tmp_path: Path) -> None:
    teacher = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    answers = {"row": range(4), "label": [0.0, 1.0, 1.0, 0.0], "student": [[1.0, 0.0]] * 4, "teacher": teacher}
    folder = write_run(tmp_path / "run", after={"accuracy": 0.5, "agreement": 0.75}, answers=answers)
    assert "The teacher's accuracy on the rows of kd is 0.7500." in leaderboard(load([folder])).text
    assert not any("teacher's" in text for text in leaderboard(load([folder], "agreement")).text)


def test_runs_that_were_measured_on_other_rows_are_said_to_be(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{seed}", seed=seed, after={"accuracy": 0.8}) for seed in range(2)]
    assert not any("same rows" in text for text in leaderboard(load(folders)).text)
    recipe = folders[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("batch_rows: 8", "batch_rows: 8\n  evaluate_rows: 100"))
    assert "Not all runs were measured on the same rows" in leaderboard(load(folders)).text[-1]


def test_methods_are_tested_pair_by_pair_over_common_seeds(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    rkd = [0.70, 0.65, None]
    one, two, three = compare(load([write_sweep(tmp_path / "sweep", {"kd": KD, "pkd": PKD, "rkd": rkd})]))
    assert [(pair.one, pair.other, pair.seeds) for pair in (one, two, three)] == [("pkd", "kd", 3), ("pkd", "rkd", 2), ("kd", "rkd", 2)]
    p = [stats.ttest_rel(PKD, KD).pvalue, stats.ttest_rel(PKD[:2], rkd[:2]).pvalue, stats.ttest_rel(KD[:2], rkd[:2]).pvalue]
    assert [pair.p for pair in (one, two, three)] == pytest.approx(p)
    assert one.difference == pytest.approx(0.14 / 3)
    order = sorted(range(3), key=lambda place: p[place])
    corrected = np.maximum.accumulate([min(1.0, p[place] * (3 - rank)) for rank, place in enumerate(order)])
    assert [(one, two, three)[place].corrected for place in order] == pytest.approx(corrected.tolist())
    assert not any(pair.resolved for pair in (one, two, three))


def test_lower_is_better_turns_the_order_round(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    runs = load([write_sweep(tmp_path / "sweep", {"kd": KD, "pkd": PKD}, metric="-accuracy")])
    assert cells(found(leaderboard(runs), "Best"), "method") == ["kd", "pkd"]
    (pair,) = compare(runs)
    assert (pair.one, pair.difference) == ("kd", pytest.approx(-0.14 / 3))


def test_a_difference_that_every_seed_shows_is_resolved(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    runs = load([write_sweep(tmp_path / "sweep", {"kd": [0.800, 0.801, 0.802, 0.803], "pkd": [0.900, 0.902, 0.901, 0.903]})])
    (pair,) = compare(runs)
    assert pair.resolved
    section = comparisons(runs)
    assert cells(found(section, "pkd against"), "verdict") == ["pkd is better"]
    assert section is not None
    assert section.text[0] == "Resolved: 1 of 1 pairs of methods."


def test_one_seed_is_not_tested_and_that_is_said(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    section = comparisons(load([write_sweep(tmp_path / "sweep", {"kd": [0.8], "pkd": [0.9]})]))
    assert section is not None
    assert "one seed: no test" in section.text[0]
    assert cells(found(section, "pkd against"), "verdict") == ["one seed: no test"]
    assert section.pictures == ()  # there are no intervals to draw


def test_the_interval_over_rows_pairs_the_answers_to_the_same_rows(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    labels = [0.0, 1.0] * 20
    right = [[1.0, 0.0], [0.0, 1.0]] * 20
    wrong_at_first = [[-a, -b] if place < 12 else [a, b] for place, (a, b) in enumerate(right)]
    of = {"row": range(40), "label": labels}
    answers = {"method=kd-seed=0": {**of, "student": wrong_at_first}, "method=pkd-seed=0": {**of, "student": right}}
    (pair,) = compare(load([write_sweep(tmp_path / "sweep", {"kd": [28 / 40], "pkd": [1.0]}, answers=answers)]))
    assert pair.rows == 40
    assert pair.over_rows is not None
    low, high = pair.over_rows  # of 12 ones among 40 values: 0.3, and 1.96 standard errors of 0.0725 about it
    assert low == pytest.approx(0.3 - 1.96 * 0.0725, abs=0.04)
    assert high == pytest.approx(0.3 + 1.96 * 0.0725, abs=0.04)

    answers["method=pkd-seed=0"] = {**of, "row": range(1, 41), "student": right}
    other = load([write_sweep(tmp_path / "other rows", {"kd": [28 / 40], "pkd": [1.0]}, answers=answers)])
    assert compare(other)[0].over_rows is None


def test_scores_of_rows_are_the_metrics_own() -> None:
    student, teacher = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    answers = Answers(Path("s"), "dev", np.array([0, 1]), np.array([0.0, 0.0]), student, teacher)
    assert row_values(answers, "accuracy") == pytest.approx([1.0, 0.0])
    assert row_values(answers, "agreement") == pytest.approx([0.0, 1.0])
    p, q = np.exp(teacher[0]) / np.exp(teacher[0]).sum(), np.exp(student[0]) / np.exp(student[0]).sum()
    assert row_values(answers, "task_kl") == pytest.approx([float((p * np.log(p / q)).sum()), 0.0])
    assert row_values(answers, "matthews") is None


@pytest.fixture(scope="module")
def written(write_sweep: Callable[..., Path], write_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a sweep and of a run whose method has a name that HTML and Markdown could misread."""
    folder = tmp_path_factory.mktemp("report")
    logs = [{"loss": 2.0 / step, "kd/soft": 1.0 / step, "gradient/block.1": 0.5, "step": step} for step in range(1, 400)]
    logs += [{"eval_accuracy": 0.7, "step": 200}]
    odd = write_run(folder / "odd", methods=["<script>alert(1)</script> | x"], before={"accuracy": 0.5}, after={"accuracy": 0.6}, logs=logs)
    write_report(load([write_sweep(folder / "sweep", {"kd": KD, "pkd": PKD}), odd]), folder / "out")
    return folder / "out"


def test_the_page_is_whole_and_needs_nothing_else(written: Path) -> None:
    html = (written / "report.html").read_text()
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    names = {tag for tag, _ in page.elements}
    assert {"main", "nav", "section", "table", "figure", "svg", "figcaption", "details"} <= names
    assert not names & {"script", "link", "iframe", "img", "object"}
    targets = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("href", "src", "xlink:href")]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert targets
    assert all(value and value.startswith("#") and value[1:] in ids for value in targets)
    assert len(ids) == len(set(ids))
    assert "url(http" not in html
    assert "@import" not in html


def test_text_of_runs_is_escaped(written: Path) -> None:
    html, markdown = (written / "report.html").read_text(), (written / "report.md").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | x" in html
    assert "<script>" not in markdown.replace(r"\<script\>", "")
    assert r"\<script\>alert(1)\</script\> \| x" in markdown


def test_colours_are_roles_that_have_a_dark_variant(written: Path) -> None:
    html = (written / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    used = set(re.findall(r"var\(--([a-z0-9-]+)", html)) - {"font"}
    assert {"ink", "muted", "grid", "paper", "series-0"} <= used
    blocks = re.findall(r"\{ ((?:--[a-z0-9-]+: #[0-9a-f]{6}; )+|.*?--ink.*?)\}", style[1])
    assert "@media (prefers-color-scheme: dark)" in style[1]
    assert len(blocks) >= 3  # light, dark by the system, dark by the button
    for role in used:
        assert len(set(re.findall(rf"--{role}: (#[0-9a-f]{{6}});", style[1]))) == 2
    assert not re.findall(r'style="[^"]*#[0-9a-fA-F]{6}', html)


def test_markdown_has_the_pages_tables_and_its_pictures_beside_it(written: Path) -> None:
    text = (written / "report.md").read_text()
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert {"pictures/leaderboard.svg", "pictures/comparisons.svg", "pictures/curves-terms-0.svg"} <= set(pictures)
    for name in pictures:
        svg = (written / name).read_text()
        assert svg.startswith("<?xml")
        assert "prefers-color-scheme: dark" in svg
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    rules = [place for place, line in enumerate(lines) if set(line) <= set("| -")]
    assert len(rules) >= 4
    assert all(widths[place - 1] == widths[place] == widths[place + 1] for place in rules)
    assert "0.8700 ± 0.0265" in text


def test_tables_are_read_back_as_they_were(written: Path) -> None:
    folder = written.parent
    again = tables(load([folder / "sweep", folder / "odd"]))
    assert set(again) == set(SCHEMAS)
    for name, table in again.items():
        stored = pq.read_table(written / f"{name}.parquet")
        assert stored.schema == SCHEMAS[name]
        assert stored.equals(table)
    runs = pq.read_table(written / "runs.parquet").to_pylist()
    assert [run["score"] for run in runs] == [*KD, *PKD, 0.6]
    assert json.loads(runs[0]["parameters"]) == {"method": "kd"}
    assert runs[0]["student_parameters"] == 10
    curves = pq.read_table(written / "curves.parquet").to_pylist()
    assert [line["value"] for line in curves if line["name"] == "kd/soft"] == [1.0 / step for step in range(1, 400)]  # not thinned


def test_a_report_is_written_over_an_earlier_one_and_over_nothing_else(write_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = load([write_run(tmp_path / "run", after={"accuracy": 0.6})])
    first = write_report(runs, tmp_path / "out").read_bytes()
    (tmp_path / "out" / "pictures" / "old.svg").write_text("")
    assert write_report(runs, tmp_path / "out").read_bytes() == first
    assert not (tmp_path / "out" / "pictures" / "old.svg").exists()
    with pytest.raises(ValueError, match=r"--save: expected an earlier report"):
        write_report(runs, tmp_path / "run")


def test_a_run_that_has_only_begun_has_a_report(write_run: Callable[..., Path], tmp_path: Path) -> None:
    begun = write_run(tmp_path / "begun", before={"accuracy": 0.5}, logs=[{"loss": 2.0, "step": 2}, {"loss": 1.0, "step": 4}])
    text = write_report(load([begun]), tmp_path / "out").read_text()
    assert "4 steps done" in text
    assert "Learning curves" in text
