"""What reports must be: one HTML page that asks for nothing from anywhere, the same when it is drawn again."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

from pipelines.run import measured


class Links(HTMLParser):
    """Everything by which a page can ask for something else, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]


def pictures_of(html):
    """The SVG texts inside a page, after a look that it asks for nothing else."""
    links = Links()
    links.feed(html)
    assert not {"script", "link", "iframe", "object"} & set(links.tags)
    assert "@import" not in html
    assert "url(" not in html
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found), links.found
    texts = [base64.b64decode(link.partition(",")[2]).decode() for link in links.found]
    for text in texts:
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r'href="(?!#)', text), "a picture asks for something outside of it"
        assert "@import" not in text
    return texts


def assert_drawn_again(run: Path, target: Path) -> None:
    """The report of a run from its directory alone is the one that is there; figures are made and not drawn."""
    with (
        mock.patch("pipelines.common.figures.write"),
        mock.patch("pipelines.common.figures.svg", return_value=b""),
        mock.patch("pipelines.experiment.setup.prepare", side_effect=AssertionError),
    ):
        measured.again(run, target, print)
    assert {path.name for path in target.iterdir()} == {"summary.md", "summary.html", "summary.json", "results.tex"}
    for name in ("summary.md", "summary.json", "results.tex"):
        assert (target / name).read_text() == (run / name).read_text(), name
