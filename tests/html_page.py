"""A page read with html.parser, for tests."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action"}


class Page(HTMLParser):
    """Collects what a browser would load, tags, texts and tables; fails where tags do not nest or stay open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.title = ""
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        """Cells of every row (head included) of every table, as text."""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []
        assert self.tags[:2] == ["html", "head"] and self.tags.count("html") == self.tags.count("body") == 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in LOADING]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in LOADING]

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] == ["title"] and "svg" not in self._open:
            self.title += data
        if "h1" in self._open or "h2" in self._open:
            self.headings[-1] += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
