"""Reports as pages: one HTML file that asks for nothing from anywhere, made of the Markdown beside it."""

import pytest
from matplotlib.figure import Figure

from pipelines.common import figures
from pipelines.results import pages
from tests.pages import pictures_of


def a_figure():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 3], **figures.look(0))
    return figure


TEXT = "# A <b>title</b> & more\n\n| a | b |\n| --- | --: |\n| x_y_z | 1 |\n\n![What it shows](one.png)\n"


def test_a_page_has_its_figures_inside_and_shows_text_as_it_is(tmp_path):
    pages.write(tmp_path, TEXT, {"one.png": a_figure()})
    assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "summary.html", "one.png", "one.pdf"}
    assert (tmp_path / "summary.md").read_text() == TEXT
    html = (tmp_path / "summary.html").read_text()
    (picture,) = pictures_of(html)
    assert figures.COLORS[0].lower() in picture
    assert 'alt="What it shows"' in html
    assert "<title>A &lt;b&gt;title&lt;/b&gt; &amp; more</title>" in html
    assert "<b>" not in html
    assert "<td>x_y_z</td>" in html
    assert '<td style="text-align:right">1</td>' in html


def test_a_page_is_the_same_for_the_same_figures():
    assert pages.as_html(TEXT, {"one.png": a_figure()}) == pages.as_html(TEXT, {"one.png": a_figure()})


def test_a_picture_that_is_no_figure_is_refused():
    with pytest.raises(ValueError, match=r"the text shows 'one\.png', and the figures are two\.png: hand it over"):
        pages.as_html(TEXT, {"two.png": a_figure()})


def test_a_table_in_markdown():
    lines = pages.table(["a", "b", "c"], [["x|y", "1", "2"]], left=2)
    assert lines == ["| a | b | c |", "| --- | --- | --: |", r"| x\|y | 1 | 2 |"]
