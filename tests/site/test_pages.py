"""Every page of the built site: as a file, and as it is seen on a telephone and on a laptop, light and dark."""

import pytest
from window import without_prompts

SCHEMES = ("light", "dark")


def test_links_lead_somewhere_and_nothing_is_left_unnamed(site, name):
    problems = site.problems(name)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_can_be_read(window, width, name, screenshots, record_property):
    page = window.open(name)
    problems = [*window.problems]
    for scheme in SCHEMES:
        problems += window.measure(scheme)
        if screenshots:
            page.screenshot(path=screenshots / f"{name.replace('/', '-')}-{width}-{scheme}.png", full_page=True)
    record_property(f"looked at in {width} px, {' and '.join(SCHEMES)}", name)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("width", [1280])
def test_code_is_copied_without_prompts_and_output(window, name):
    window.open(name)
    for block in window.copied():
        assert block["copied"] is not None, f"no button copies {block['shown']!r}"
        assert block["copied"].strip() == without_prompts(block["shown"]).strip()
        if block["language"] in ("python", "pycon", "ipython3", "pycon3"):
            compile(block["copied"], name, "exec")
