"""What a report as one HTML page must be: it asks for nothing from anywhere."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree


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
