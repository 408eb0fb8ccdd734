"""The built site as files: its pages, and what is wrong with them that needs no browser to be seen."""

from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAMED = {"a", "button"}  # elements of which a screen reader says the name
ADDRESSES = {"href", "src", "poster", "data"}
FOREIGN = {"link": "href", "script": "src", "img": "src", "iframe": "src"}  # what a browser brings by itself


@dataclass
class Page:
    """What one HTML file has in it."""

    lang: str | None = None
    title: str = ""
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    images: list[tuple[str, str | None]] = field(default_factory=list)  # source, text in its place
    loaded: list[str] = field(default_factory=list)  # brought with the page
    nameless: list[str] = field(default_factory=list)  # links and buttons that say nothing
    twice: list[str] = field(default_factory=list)  # identifiers of two elements


class Reader(HTMLParser):
    """Read one HTML file into a `Page`."""

    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._in_title = False
        self._in_svg = 0
        self._named: list[tuple[str, list[str]]] = []  # open links and buttons: how they begin, and what they say

    def handle_starttag(self, tag, attrs):
        given, page = dict(attrs), self.page
        self._in_title = tag == "title" and not self._in_svg
        self._in_svg += tag == "svg"
        if tag == "html":
            page.lang = given.get("lang")
        for anchor in {given.get("id"), given.get("name") if tag == "a" else None} - {None, ""}:
            if anchor in page.anchors:
                page.twice.append(anchor)
            page.anchors.add(anchor)
        page.links += [given[name] for name in sorted(ADDRESSES & given.keys()) if given[name]]
        if given.get(FOREIGN.get(tag)) and given.get("rel") not in ("canonical", "next", "prev", "search", "index"):
            page.loaded.append(given[FOREIGN[tag]])
        if tag == "img":
            page.images.append((given.get("src") or "", given.get("alt")))
        says = given.get("aria-label") or given.get("title") or given.get("alt") or ""
        for _, name in self._named:
            name.append(says)
        if tag in NAMED and (tag == "button" or given.get("href")) and given.get("aria-hidden") != "true":
            self._named.append((self.get_starttag_text(), [says]))

    def handle_endtag(self, tag):
        self._in_title = False
        self._in_svg -= tag == "svg"
        if tag in NAMED and self._named and self._named[-1][0].startswith(f"<{tag}"):
            text, name = self._named.pop()
            if not "".join(name).strip():
                self.page.nameless.append(text)

    def handle_data(self, data):
        if self._in_title:
            self.page.title += data
        for _, name in self._named:
            name.append(data)


class Site:
    """A folder of HTML files.

    `pages` are all that Sphinx made, by their paths in it, sorted: none of what themes bring along in `_static`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        self.pages = sorted(
            name for name in self.files if name.endswith(".html") and not name.startswith(("_static/", "_downloads/"))
        )

    @cached_property
    def parsed(self) -> dict[str, Page]:
        return {name: parse((self.folder / name).read_text(encoding="utf-8")) for name in self.pages}

    def problems(self, name: str) -> list[str]:
        """Say what is wrong with the page `name` and with what it points at."""
        page = self.parsed[name]
        found = [f"{link}: {why}" for link in page.links if (why := self._broken(name, link))]
        found += [f"{address} is brought from another host" for address in page.loaded if urlsplit(address).netloc]
        found += [f"the image {source} has no text in its place" for source, text in page.images if not text]
        found += [f"{text} says nothing" for text in page.nameless]
        found += [f"two elements are #{anchor}" for anchor in page.twice]
        if not page.lang:
            found.append("<html> has no lang")
        if not page.title.strip():
            found.append("it has no title")
        return found

    def _broken(self, name: str, link: str) -> str | None:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            return None  # of another host, or what it says itself
        path = unquote(parts.path)
        if path.startswith("/"):
            return "it begins at the host's root, and the site may stand in a folder"
        target = self._relative(name, path) if path else name
        if target not in self.files:
            return f"there is no {target}"
        anchor = unquote(parts.fragment)
        if not anchor or target not in self.parsed or anchor in self.parsed[target].anchors:
            return None
        return f"{target} has no #{anchor}"

    def _relative(self, name: str, path: str) -> str:
        """Resolve `path`, seen from the page `name`; a folder is its index.html."""
        parts = name.split("/")[:-1]
        for part in path.split("/"):
            if part == "..":
                parts = parts[:-1] if parts else [".."]
            elif part not in (".", ""):
                parts.append(part)
        target = "/".join(parts)
        return f"{target}/index.html".lstrip("/") if not target or path.endswith("/") else target


def parse(text: str) -> Page:
    """Read the HTML `text`.

    >>> parse('<html lang="en"><h1 id="a">A</h1><a href="#b"></a>').nameless
    ['<a href="#b">']
    """
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader.page
