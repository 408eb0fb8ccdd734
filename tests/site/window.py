"""A window of the browser that keeps what goes wrong in it, and a server for it over loopback."""

import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).parent
MEASURE = (HERE / "measure.js").read_text(encoding="utf-8")
COPY = (HERE / "copy.js").read_text(encoding="utf-8")
HEIGHT = {390: 844, 1280: 900}  # px, by the width: a telephone and a small laptop
# No name is looked up, and no other host is reached, whatever a page asks for.
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


class Quiet(SimpleHTTPRequestHandler):
    """Serve files without a line for each."""

    protocol_version = "HTTP/1.1"  # one connection for many files

    def log_message(self, *args):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=600")  # scripts and styles are those of the page before
        super().end_headers()


@contextmanager
def served(folder: Path):
    """Serve `folder` on a free port of the loopback; gives the address, with a slash at its end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class Window:
    """A window of the browser in which pages of the site at `address` are opened.

    `problems` are what the browser said since the last `open`: errors, files that it did not get, and hosts that it
    asked besides.
    """

    def __init__(self, browser, address: str) -> None:
        self.address = address
        self.context = browser.new_context(reduced_motion="reduce", permissions=["clipboard-read", "clipboard-write"])
        self.context.set_default_timeout(120_000)  # ms: a busy machine is slow
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.problems.append(f"an error in a script: {error}"))
        self.page.on("request", self._asked)
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._answered)

    def open(self, name: str, width: int):
        """Open the page `name` of the site in a window `width` px wide, light; returns the page."""
        self.problems.clear()
        self.show(width, "light")
        self.page.goto(self.address + name, wait_until="load")
        return self.page

    def show(self, width: int, scheme: str) -> None:
        """Make the window `width` px wide, for a reader who prefers `scheme`."""
        self.page.set_viewport_size({"width": width, "height": HEIGHT[width]})
        self.page.emulate_media(color_scheme=scheme)

    def measure(self) -> list[str]:
        """Say what is wrong with the page as it is seen."""
        return self.page.evaluate(MEASURE)

    def copy(self) -> list[str]:
        """Press all buttons that copy, and say what is wrong with what they copied."""
        problems = []
        for block in self.page.evaluate(COPY):
            wanted = without_prompts(block["shown"])
            if block["copied"] is None:
                problems.append(f"no button copies {wanted!r}")
            elif block["copied"].strip() != wanted.strip():
                problems.append(f"{block['copied']!r} is copied, not {wanted!r}")
        return problems

    def _said(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(f"the console says: {message.text}")

    def _asked(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.problems.append(f"{urlsplit(request.url).netloc} was asked for {request.url}")

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # what was still on its way as the reader went to another page
            self.problems.append(f"{request.url}: {request.failure}")

    def _answered(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.url}: {response.status}")


def without_prompts(text: str) -> str:
    r"""What a reader wants of a block of code: where it has prompts its commands, and empty lines, and else all of it.

    >>> without_prompts(">>> def f():\n...     return 1\n...\n>>> f()\n1\n")
    'def f():\n    return 1\n\nf()'
    >>> without_prompts("a = 1\n")
    'a = 1'
    """
    prompt = re.compile(r"(>>> ?|\.\.\. ?|\$ )(.*)|$")
    lines = text.rstrip().split("\n")
    if not any(line.startswith((">>>", "$ ")) for line in lines):
        return "\n".join(lines)
    return "\n".join(found[2] or "" for found in map(prompt.fullmatch, lines) if found)
