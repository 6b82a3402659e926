"""Fixtures of several test files: the built book, and a browser.

The fixtures import what only they need, because a lent machine with a GPU has neither the book's tools nor a browser.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import chromium
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from pretended_gpu import PretendedGPU

PRETENDED = pytest.StashKey["PretendedGPU | None"]()

ROOT = Path(__file__).parents[1]

# The longest chapters come first, then the others, then the longest test files. The first of these files builds the
# book. Other files that need the book come later, since another worker would wait for the build.
LONGEST = [
    "ood.ipynb",
    "06_cglow.ipynb",
    "03_realnvp.ipynb",
    "05_glow.ipynb",
    "02_dequantization.ipynb",
    "test_book.py",
    "test_clinic.py",
    "test_pdf.py",
    "test_processes.py",
    "test_trainer.py",
    "test_runs.py",
    "test_playground_training.py",
    "test_playground.py",
    "test_device.py",
    "test_glow.py",
    "test_table.py",
    "test_ablations.py",
    "test_bijections.py",
    "test_models.py",
    "test_house.py",
]


def pytest_configure(config: pytest.Config) -> None:
    try:
        chromium.find()  # a wrong name is an error before the first test
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if getattr(config.option, "numprocesses", None):
        return  # the process that only starts the workers does not wait for torch
    import pretended_gpu
    import torch

    # The device is installed here, because that must happen before any test's backward pass.
    config.stash[PRETENDED] = None if torch.cuda.is_available() else pretended_gpu.install()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = sum(chromium.MISSING in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(
            f"Skipped browser tests: {skipped}, because there is {chromium.MISSING}", yellow=True
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", places.get(item.path.name, len(LONGEST))))


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """The files that git tracks, without those that are deleted here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="session")
def tracked_texts(tracked_files: list[Path]) -> dict[Path, str]:
    """The contents of the tracked files that are text; pictures and weights are not."""
    texts = {}
    for path in tracked_files:
        with suppress(UnicodeDecodeError):
            texts[path] = path.read_text(encoding="utf-8")
    return texts


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The book's html folder, built into a temporary folder with the flags of ``make book``, once for all workers."""
    from filelock import FileLock

    flags = re.search(r"jupyter-book build \. (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert flags, "expected `jupyter-book build .` in the Makefile"
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "book"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            command = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", *flags[1].split()]
            built = subprocess.run([*command, "--path-output", str(out)], cwd=ROOT, capture_output=True, text=True)
            assert built.returncode == 0, f"the book does not build:\n{built.stdout[-3000:]}\n{built.stderr[-3000:]}"
    return out / "_build" / "html"


class Server(SimpleHTTPRequestHandler):
    """A server of the book that lets the browser cache files, since scripts take most of a page's loading time."""

    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class WithoutMathematics(Server):
    """A server that sends an empty script instead of MathJax, which takes long to load."""

    def do_GET(self) -> None:
        if "/tex-chtml.js" not in self.path:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def served(book: Path, kind: type[Server]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=book))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def site(book: Path) -> Iterator[str]:
    """The address at which this machine serves the built book to itself."""
    with served(book, Server) as address:
        yield address


@pytest.fixture(scope="session")
def plain_site(book: Path) -> Iterator[str]:
    """The address of the same book without MathJax, so that formulas stay as they are written."""
    with served(book, WithoutMathematics) as address:
        yield address


@pytest.fixture(scope="session")
def pretended(pytestconfig: pytest.Config) -> PretendedGPU:
    """The mode of the pretended GPU, which a test enters."""
    mode = pytestconfig.stash[PRETENDED]
    if mode is None:
        pytest.skip("a real GPU is there")
    return mode


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium, since Playwright's own is never downloaded."""
    path = chromium.find()
    if path is None:
        pytest.skip(chromium.MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=chromium.ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def opened(browser: Browser) -> Callable[..., AbstractContextManager[Page]]:
    """Opens a page without MathJax; an error on it, or a request for none of the prefixes, fails the test."""
    from mathematics import leave_out_mathematics

    @contextmanager
    def open_page(address: str, *prefixes: str) -> Iterator[Page]:
        context = browser.new_context(viewport={"width": 1200, "height": 1000})
        page = context.new_page()
        trouble: list[str] = []
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(prefixes) else trouble.append(request.url))
        leave_out_mathematics(page)
        page.goto(address)
        yield page
        context.close()
        assert not trouble

    return open_page
