"""Every page of the built site: as a file, and as it is seen on a telephone and on a laptop, light and dark."""

import zlib

from window import HEIGHT

WAYS = [(width, scheme) for width in HEIGHT for scheme in ("light", "dark")]


def ways(name: str):
    """Return the widths and schemes in which a page is looked at.

    These are all four; listings of modules are more than half of all, made alike, and each has one of the four.
    """
    return [WAYS[zlib.crc32(name.encode()) % len(WAYS)]] if name.startswith("_modules/") else WAYS


def test_links_lead_somewhere_and_nothing_is_left_unnamed(site, name):
    problems = site.problems(name)
    assert not problems, "\n".join(problems)


def test_the_page_can_be_read_and_its_code_copied(window, name, screenshots, record_property):
    page = window.open(name, ways(name)[0][0])
    problems = []
    for width, scheme in ways(name):
        window.show(width, scheme)
        problems += [f"{width} px, {scheme}: {problem}" for problem in window.measure()]
        if screenshots:
            page.screenshot(path=screenshots / f"{name.replace('/', '-')}-{width}-{scheme}.png", full_page=True)
    problems += window.copy() + window.problems
    record_property("looked at", name)
    assert not problems, "\n".join(problems)
