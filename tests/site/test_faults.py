"""The checks of pages find the faults that they are for: each in a small page that is well but for one thing."""

import pytest
from built import Site
from window import Window, served

GOOD = """<!doctype html>
<html lang="en">
<head><title>Good</title><link rel="icon" href="data:,"><style>body {{ background: #fff; color: #222 }}</style></head>
<body><main><article>
<h1 id="top">Good</h1>
<p>Read <a href="other.html#there">the other one</a>, or go <a href="#top">up</a>.</p>
<img src="dot.svg" alt="A dot">
<div style="overflow-x: auto"><table style="width: 900px"><tr><td>A wide table in its box</td></tr></table></div>
{}
</article></main></body></html>"""
FILES = {
    "other.html": GOOD.format('<h2 id="there">There</h2>'),
    "dot.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="9"/></svg>',
    "torn.png": "this is no picture",
}
IN_FILES = {
    '<a href="nowhere.html">one</a>': "nowhere.html: there is no nowhere.html",
    '<a href="../other.html">one</a>': "../other.html: there is no ../other.html",
    '<a href="/other.html">one</a>': "it begins at the host's root",
    '<a href="other.html#here">one</a>': "other.html has no #here",
    '<a href="#here">one</a>': "index.html has no #here",
    '<img src="none.png" alt="None">': "there is no none.png",
    '<img src="dot.svg">': "the image dot.svg has no text in its place",
    '<img src="dot.svg" alt="">': "the image dot.svg has no text in its place",
    '<a href="other.html"><svg></svg></a>': "says nothing",
    "<button></button>": "<button> says nothing",
    '<p id="top">': "two elements are #top",
    '<script src="https://example.com/a.js"></script>': "https://example.com/a.js is brought from another host",
}
IN_BROWSER = {
    '<script>console.error("oh")</script>': "the console says: oh",
    "<script>throw Error('oh')</script>": "an error in a script: oh",
    '<script src="none.js"></script>': "none.js: 404",
    '<img src="https://example.com/a.png" alt="A">': "example.com was asked for https://example.com/a.png",
    '<img src="torn.png" alt="Torn">': "the image torn.png cannot be shown",
    '<img src="torn.png" alt="Torn" loading="lazy" style="margin-top: 9000px">': "the image torn.png cannot be shown",
    '<p style="color: #999">Pale</p>': "contrast 2.85, not 4.5: rgb(153, 153, 153) on rgb(255, 255, 255)",
    '<p style="opacity: 0.4">Pale</p>': "contrast",
    '<div style="background: #333"><p style="background: #0008">Dark</p></div>': "contrast",
    "<style>@media (prefers-color-scheme: dark) { body { background: #111 } }</style>": "dark: contrast",
    '<p style="width: 700px">Wide</p>': "the page is",
    f"<p>{'long' * 99}</p>": "article > p reaches from 8 to",
    '<div style="overflow: hidden"><p style="width: 700px">Cut off</p></div>': "> div reaches from 8 to 708 px of 390",
    "<h1>Another</h1>": "it has 2 headings h1, not one",
    "<h3>Low</h3>": '"Low" is a heading h3 under an h1',
}


@pytest.fixture
def small(tmp_path):
    """Write the small site with `more` in its first page."""

    def write(more: str) -> Site:
        for name, text in (FILES | {"index.html": GOOD.format(more)}).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return Site(tmp_path)

    return write


@pytest.fixture
def seen(browser):
    """What is wrong with the first page of a site in a window of 390 px."""

    def look(site: Site) -> list[str]:
        with served(site.folder) as address:
            window = Window(browser, address)
            window.open("index.html", 390)
            problems = window.measure()
            window.show(390, "dark")
            problems += [f"dark: {problem}" for problem in window.measure()]
            window.context.close()
            return window.problems + problems

    return look


def test_a_good_page_is_good(small, seen):
    site = small("")
    assert [site.problems(name) for name in site.pages] == [[], []]
    assert seen(site) == []


@pytest.mark.parametrize("fault", IN_FILES)
def test_a_fault_in_the_file_is_found(small, fault):
    [problem] = small(fault).problems("index.html")
    assert IN_FILES[fault] in problem


def test_a_page_says_its_language_and_title(small):
    site = small("")
    (site.folder / "index.html").write_text("<html><title> </title></html>")
    assert site.problems("index.html") == ["<html> has no lang", "it has no title"]


@pytest.mark.parametrize("fault", IN_BROWSER)
def test_a_fault_on_the_screen_is_found(small, seen, fault):
    problems = seen(small(fault))
    assert any(IN_BROWSER[fault] in problem for problem in problems), problems
