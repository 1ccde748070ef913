"""Figures as SVG: colours are roles, text is text, ids are their own, and a file knows both variants."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from student_train.report.colours import ROLES, diverging_map, series
from student_train.report.drawing import legend, panels, style, svg, svg_file


def drawn(name: str) -> str:
    with style():
        figure, axes = panels(1, 2, 2.0)
        axes[0].plot([1, 2], [3, 4], label="a < b & c")
        axes[0].legend()
        axes[1].pcolormesh(np.array([[1.0, np.nan], [-1.0, 0.0]]), cmap=diverging_map(), vmin=-1, vmax=1)
        return svg(figure, name)


def test_no_two_roles_share_a_light_colour() -> None:
    assert len({colour.light for colour in ROLES.values()}) == len(ROLES)
    assert all(re.fullmatch("#[0-9a-f]{6}", tone) for colour in ROLES.values() for tone in (colour.light, colour.dark))


def test_every_colour_of_a_figure_is_a_role() -> None:
    text = drawn("one")
    assert not re.findall("#[0-9a-fA-F]{6}", text)
    assert {"ink", "muted", "grid", "series-0", "diverging-0", "diverging-10", "diverging-20"} <= set(
        re.findall(r"var\(--([a-z0-9-]+)\)", text)
    )


def test_text_stays_text_and_is_escaped() -> None:
    texts = [element.text for element in ElementTree.fromstring(drawn("one")).iter() if element.tag.endswith("text")]
    assert "a < b & c" in texts


def test_two_figures_on_a_page_have_no_id_in_common_and_the_same_figure_is_drawn_alike() -> None:
    ids = [set(re.findall(r'\bid="([^"]+)"', drawn(name))) for name in ("one", "two")]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn("one"))) <= ids[0]
    assert drawn("one") == drawn("one")


def test_a_file_has_both_variants_of_the_colours_that_it_uses() -> None:
    text = svg_file(drawn("one"))
    ElementTree.fromstring(text.partition("\n")[2])
    for role in ("ink", "series-0", "diverging-20"):
        assert [ROLES[role].light, ROLES[role].dark] == re.findall(rf"--{role}: (#[0-9a-f]{{6}});", text)
    assert "--series-5:" not in text


def test_text_is_readable_on_every_tone_and_series_on_the_page() -> None:
    """Contrast as WCAG 2.1 defines it: 4.5 for text on cells, 3 for lines."""

    def contrast(one: str, other: str) -> float:
        lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink, paper = ROLES["ink"], ROLES["paper"]
    for role, colour in ROLES.items():
        if role.startswith(("diverging", "sequential")):
            assert contrast(ink.light, colour.light) >= 4.5, role
            assert contrast(ink.dark, colour.dark) >= 4.5, role
        if role.startswith("series"):
            assert contrast(paper.light, colour.light) >= 3, role
            assert contrast(paper.dark, colour.dark) >= 3, role
    assert contrast(ink.light, paper.light) >= 7
    assert contrast(ROLES["muted"].light, paper.light) >= 4.5
    assert contrast(ROLES["muted"].dark, paper.dark) >= 4.5
    assert series(0) == ROLES["series-0"].light == series(8)


@pytest.mark.parametrize(
    ("labels", "columns"), [(["kd", "pkd"], 2), ([f"method-{number}/a long term" for number in range(13)], 5), (["x" * 300, "y"], 1)]
)
def test_a_legend_has_as_many_columns_as_fit(labels: list[str], columns: int) -> None:
    with style():
        figure, axes = panels(1, 1, 2.0)
        legend(figure, {label: axes[0].plot([1, 2], [number, number])[0] for number, label in enumerate(labels)})
    figure.draw_without_rendering()
    (made,) = figure.legends
    assert [text.get_text() for text in made.get_texts()] == labels
    lefts = {round(text.get_window_extent().x0) for text in made.get_texts()}
    assert len(lefts) == columns
    assert columns == 1 or max(text.get_window_extent().x1 for text in made.get_texts()) <= figure.bbox.x1
