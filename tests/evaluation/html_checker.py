"""Follows which elements of a page are open, and what is loaded from where."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}  # elements that have no end


class HtmlChecker(HTMLParser):
    """Fails on an end that is not the innermost element's; `close` fails on open elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(page: str) -> HtmlChecker:
    """Parse a page that must stand alone: no scripts, nothing from elsewhere."""
    checker = HtmlChecker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(source.startswith("data:image/jpeg;base64,") for source in checker.sources)
    assert "url(" not in page and "http" not in page
    return checker
