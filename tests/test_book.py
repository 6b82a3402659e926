"""The built book: it builds without a warning, works without a network, and leads nowhere that does not exist."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
MAX_PAGE_BYTES = 1_500_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a page loads by itself. A plain <a> may lead elsewhere: the reader chooses to follow it.
LOADING_RELS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon", "manifest"}
LOADING_TAGS = {"script", "img", "iframe", "source", "video", "audio", "embed", "object", "track", "input"}


class Page(HTMLParser):
    """What one built page loads, links to, shows and can be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.links: list[str] = []
        self.images: list[tuple[str, str]] = []  # (src, alt)
        self.anchors: set[str] = set()
        self.styles: list[str] = []
        self._in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        self.styles.append(values.get("style", ""))
        self._in_style = tag == "style"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and LOADING_RELS & set(values.get("rel", "").lower().split()):
            self.loads.append(values.get("href", ""))
        if tag in LOADING_TAGS:
            self.loads += [values[name] for name in ("src", "data", "poster") if values.get(name)]
            self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "img":
            self.images.append((values.get("src", ""), values.get("alt", "")))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def other_host(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ws", "wss")


def loads_in_css(css: str) -> list[str]:
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    urls = re.findall(r"url\(\s*['\"]?([^'\")]+)", css) + re.findall(r"@import\s+['\"]([^'\"]+)", css)
    return [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book's html folder, built into a temporary folder with the flags of ``make book``."""
    flags = re.search(r"jupyter-book build \. (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert flags, "expected `jupyter-book build .` in the Makefile"
    out = tmp_path_factory.mktemp("book")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", *flags[1].split()]
    built = subprocess.run([*command, "--path-output", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, f"the book does not build:\n{built.stdout[-3000:]}\n{built.stderr[-3000:]}"
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def pages(book: Path) -> list[Page]:
    return [Page(path) for path in sorted(book.rglob("*.html")) if "_static" not in path.relative_to(book).parts]


def test_warnings_are_errors() -> None:
    assert "jupyter-book build . -W -n --keep-going" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_page_of_the_contents_is_built(book: Path) -> None:
    entries = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))
    assert entries
    missing = [entry for entry in entries if not (book / f"{entry}.html").is_file()]
    assert not missing
    assert (book / "index.html").is_file()
    assert (book / "searchindex.js").is_file()


def test_no_page_loads_from_another_host(book: Path, pages: list[Page]) -> None:
    found = [(page.path.name, load) for page in pages for load in page.loads if other_host(load)]
    found += [(page.path.name, url) for page in pages for style in page.styles for url in loads_in_css(style)]
    for sheet in book.rglob("*.css"):
        urls = loads_in_css(sheet.read_text(encoding="utf-8"))
        found += [(sheet.name, url) for url in urls if other_host(url)]
    assert not [entry for entry in found if other_host(entry[1])]


def test_inline_scripts_name_no_other_host(pages: list[Page]) -> None:
    """sphinx_thebe and the widget manager would be fetched by such a script."""
    for page in pages:
        scripts = re.findall(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", page.path.read_text("utf-8"), re.DOTALL)
        hosts = [host for script in scripts for host in re.findall(r"(?:https?|wss?)://[\w.-]+", script)]
        assert not hosts, f"{page.path.name}: expected no address in a script, came {hosts}"


def test_everything_a_page_loads_is_there(book: Path, pages: list[Page]) -> None:
    missing = []
    for page in pages:
        for load in page.loads:
            if urlsplit(load).scheme != "data" and not other_host(load):
                target = page.path.parent / unquote(urlsplit(load).path)
                if not target.is_file():
                    missing.append((page.path.name, load))
    assert not missing


def test_internal_links_resolve(pages: list[Page]) -> None:
    by_path = {page.path.resolve(): page for page in pages}
    broken = []
    for page in pages:
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            there = target.is_file() if target not in by_path else True
            fragment = unquote(parts.fragment)
            if not there or (fragment and target in by_path and fragment not in by_path[target].anchors):
                broken.append((page.path.name, link))
    assert not broken


def test_every_image_says_what_it_shows(pages: list[Page]) -> None:
    wanting = [
        (page.path.name, source, alt)
        for page in pages
        for source, alt in page.images
        if len(alt) < 10 or alt.endswith((".png", ".svg", ".jpg"))
    ]
    assert not wanting


def test_pages_are_light(pages: list[Page]) -> None:
    sizes = {page.path.name: page.path.stat().st_size for page in pages}
    assert not {name: size for name, size in sizes.items() if size > MAX_PAGE_BYTES}


def rendered(page: Path, profile: Path) -> str:
    """The page's document after its scripts have run."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_mathematics_is_typeset_from_the_files_alone(book: Path, tmp_path: Path) -> None:
    page = next(path for path in sorted((book / "chapters").glob("*.html")) if 'class="math' in path.read_text("utf-8"))
    assert "<mjx-container" in rendered(page, tmp_path), f"{page.name}: expected typeset mathematics, came none"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_sheet_of_frames_becomes_one_frame_with_a_slider(book: Path, tmp_path: Path) -> None:
    """The script has found columns, rows and the picture's size, and the frame's alt text is still there."""
    page = book / "chapters" / "03_realnvp.html"
    dom = rendered(page, tmp_path)
    view = re.search(r'<div class="frames-view" style="aspect-ratio: (\d+\.?\d*) / (\d+\.?\d*);">(<img[^>]+>)', dom)
    assert view, "expected a frame with its proportions, came none"
    assert float(view[1]) == pytest.approx(float(view[2]), rel=0.01)
    assert 'alt="' in view[3]
    assert "width: 400%" in view[3]
    assert re.search(r'<input type="range" min="1" max="12"[^>]* aria-label="frame"', dom)
    assert re.search(r"<output[^>]*>1 of 12</output>", dom)
