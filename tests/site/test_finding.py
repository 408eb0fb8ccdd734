"""Finding one's way in the built site: by its search, its menu, and the switch between light and dark."""

import re

import pytest

pytestmark = pytest.mark.parametrize("width", [390, 1280])
PAPER = "getComputedStyle(document.body).backgroundColor"


def test_search_finds_a_class(window, width):
    page = window.open("index.html", width)
    page.keyboard.press("Control+k")
    field = page.locator("input[name=q]:visible")
    field.fill("Dora")
    field.press("Enter")
    page.locator("#search-results a", has_text=re.compile(r"\bDora\b")).first.wait_for()
    page.locator("#search-results a[href*='#lora_jax.Dora']").first.click()
    page.wait_for_url("**#lora_jax.Dora")
    assert page.locator("[id='lora_jax.Dora']").is_visible()
    assert window.problems == []


def test_search_says_that_it_found_nothing(window, width):
    page = window.open("search.html?q=qqqqzzzz", width)
    page.get_by_text("did not match any documents").wait_for()
    assert window.problems == []


def test_the_menu_leads_to_another_page(window, width):
    page = window.open("index.html", width)
    menu = page.locator("#pst-primary-sidebar" if width == 1280 else "#pst-primary-sidebar-modal")
    if width == 390:
        assert not menu.is_visible()
        page.locator(".primary-toggle:visible").click()
    link = menu.locator("a.internal:not(.current):not([href='#']):visible").first
    target = link.get_attribute("href")
    link.click()
    page.wait_for_url(f"**/{target}")
    assert page.locator("article h1").is_visible()
    assert window.problems == []


def test_the_reader_may_choose_between_light_and_dark(window, width):
    page = window.open("index.html", width)
    light = page.evaluate(PAPER)
    page.locator(".theme-switch-button:visible").first.click()
    page.get_by_text("Dark", exact=True).locator("visible=true").click()
    dark = page.evaluate(PAPER)
    assert dark != light
    page.reload()
    assert page.evaluate(PAPER) == dark  # and it is kept
    page.evaluate("localStorage.clear()")
