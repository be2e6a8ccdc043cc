"""HTML pages: whether they are whole, and need no network."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img"}


class Checker(HTMLParser):
    """Balanced tags; collects addresses, ids and image descriptions."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.alts: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids |= {values["id"] or ""} if "id" in values else set()
        self.alts += [values.get("alt")] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def self_contained(text: str) -> bool:
    """Whether the page is all that a browser needs, and every image has a description."""
    page = check(text)
    without_data = re.sub(r"data:[a-z/+]+;base64,[A-Za-z0-9+/=]*", "", text)
    return (
        all(address.startswith(("data:", "#")) for address in page.addresses)
        and "http" not in without_data.lower().replace("http-equiv", "")
        and None not in page.alts
    )
