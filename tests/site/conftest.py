"""A group of its own, `make test-site`: the built site, opened in a browser over loopback.

The browser is the system's Chromium, or the one that the variable CHROMIUM names; without one, only what the files tell
is tested.
"""

import os
import shutil
from pathlib import Path

import pytest
from built import Site
from window import ALONE, HEIGHT, Window, served

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_addoption(parser):
    parser.addoption("--site", metavar="FOLDER", help="the built site, docs/_build/html")
    parser.addoption("--screenshots", metavar="FOLDER", help="write a picture of each page in both widths and schemes")


def pytest_generate_tests(metafunc):
    """Run a test that takes `name` for each page of the site."""
    if "name" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--site", None)  # absent where all groups are collected at once
        missing = pytest.param(None, marks=pytest.mark.skip(reason="which site? make test-site says it"))
        metafunc.parametrize("name", _site(folder).pages if folder else [missing])


def _site(folder: str) -> Site:
    site = Site(Path(folder))
    if "index.html" not in site.pages:
        raise pytest.UsageError(f"--site {folder}: there is no index.html in it; make docs builds the site")
    return site


WIDTHS = " and ".join(map(str, HEIGHT))


@pytest.fixture(scope="session")
def site(request):
    """The site as files."""
    folder = request.config.getoption("--site", None)
    if not folder:
        pytest.skip("which site? make test-site says it")
    return _site(folder)


@pytest.fixture(scope="session")
def browser():
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here, and CHROMIUM names no other")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra site-tests has playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=[ALONE])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def window(browser, site):
    """A window on the site."""
    with served(site.folder) as address:
        window = Window(browser, address)
        yield window
        window.context.close()


@pytest.fixture(scope="session")
def screenshots(request):
    """The folder for pictures, or None."""
    folder = request.config.getoption("--screenshots")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return folder and Path(folder)


def pytest_terminal_summary(terminalreporter):
    """Name the pages that were looked at."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    looked = [page for report in reports for kind, page in report.user_properties if kind == "looked at"]
    if looked:
        terminalreporter.section(f"{len(looked)} pages were looked at, {WIDTHS} px wide, light and dark")
        terminalreporter.write_line(" ".join(sorted(looked)))
