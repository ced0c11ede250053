"""Read the text of an HTML manual page, without its navigation and with its code blocks."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class _PageText(HTMLParser):
    """Collect the readable text of one manual page, without its navigation."""

    SKIPPED_TAGS = frozenset({"head", "script", "style", "nav", "form", "svg"})
    SKIPPED_CLASSES = frozenset(
        {"navheader", "navfooter", "toc", "headerlink", "related", "sphinxsidebar", "footer"}
        | {"mobile-nav", "linenos", "clearer"}
    )
    BLOCKS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "p", "pre", "div", "section", "article"}) | {
        *("dl", "dt", "dd", "ul", "ol", "li", "table", "blockquote", "address")
    }
    VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "wbr", "source"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping: list[str] = []  # open tags since the first one left out
        self.pre = 0
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if self.skipping or tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES:
            if tag not in self.VOID:
                self.skipping.append(tag)
        elif tag in ("br", "tr"):
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.cells += 1
            if self.parts and self.parts[-1] != "\n":
                self.parts.append(" | ")
        elif tag in self.BLOCKS:
            self.break_block()
            self.pre += tag == "pre"
            if tag == "li" and not self.cells:
                self.parts.append("- ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self.skipping and tag == "br":
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            if tag in self.skipping:
                while self.skipping.pop() != tag:
                    pass
        elif tag in ("td", "th"):
            self.cells -= 1
        elif tag in self.BLOCKS:
            self.pre -= tag == "pre"
            self.break_block()

    def break_block(self) -> None:
        """Start a new block, or inside a table only a new word: a row stays on one line."""
        if not self.cells:
            self.parts.append("\n\n")
        elif self.parts and not self.parts[-1].endswith((" ", "\n")):
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if self.skipping:
            return
        if self.pre:
            self.parts.append(data)
        else:
            text = re.sub(r"\s+", " ", data)
            # Outside code a line break in the page is only a space, and spaces do not add up.
            opens = not self.parts or self.parts[-1].endswith((" ", "\n"))
            text = text.lstrip() if opens else text
            if text:
                self.parts.append(text)


def page_text(html: str) -> str:
    """Return the readable text of an HTML page, keeping its code blocks as they are."""
    parser = _PageText()
    parser.feed(html)
    parser.close()
    # A list marker and the paragraph inside its item belong on one line.
    return re.sub(r"(?m)^- \n+(?=\S)", "- ", "".join(parser.parts))
