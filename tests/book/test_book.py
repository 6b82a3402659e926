"""Tests of the built book: it builds without a warning, works without a network, and has no dead link."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from axe_playwright_python.sync_playwright import Axe
from mathematics import leave_out_mathematics
from playwright.sync_api import Browser, BrowserContext
from playwright.sync_api import Page as BrowserPage

ROOT = Path(__file__).parents[2]
MAX_PAGE_BYTES = 1_500_000
# Attributes whose files a page loads by itself. A plain <a> may lead elsewhere, since the reader chooses to follow it.
LOADING_RELS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon", "manifest"}
LOADING_TAGS = {"script", "img", "iframe", "source", "video", "audio", "embed", "object", "track", "input"}


class Page(HTMLParser):
    """What one built page loads, what it links to and shows, and its anchors."""

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
    """No inline script names another host, from which sphinx_thebe or the widget manager would be fetched."""
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
            fragment = "" if "=" in parts.fragment else unquote(parts.fragment)  # a state of the playground
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


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser context for one reader, in which the browser caches scripts that it has loaded."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield context
    context.close()


def listen(page: BrowserPage) -> tuple[list[str], list[str]]:
    """Two lists that fill while a page works: its errors, and the addresses that it requests."""
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    return errors, requests


# axe-core compares a link's colours with those of the text around it, which takes half of its time. Here a colour is
# not enough: a link in a text must have another style, such as an underline.
STYLED_LINKS = 'axe.configure({ rules: [{ id: "link-in-text-block", any: ["link-in-text-block-style"] }] });'


def violations(page: BrowserPage, contrast: bool = True) -> list[str]:
    """The serious and critical violations that axe-core finds on a page."""
    options = {"resultTypes": ["violations"], "preload": False}  # axe would fetch style sheets from wrong addresses
    rules = {"color-contrast": {"enabled": contrast}, "region": {"enabled": False}}  # the impact of region is moderate
    results = Axe(AXE_SCRIPT + STYLED_LINKS).run(page, options={**options, "rules": rules})
    return [
        f"{violation['id']}: {node['target']} {node['html'][:150]}"
        for violation in results.response["violations"]
        for node in violation["nodes"]
        if violation["impact"] in ("serious", "critical")
    ]


@pytest.fixture(scope="module")
def read_pages(plain_site: str, context: BrowserContext) -> dict[str, dict[str, list[str]]]:
    """By page: the errors, the requests, and the violations that axe-core finds when the page is opened.

    Checks that take long (thousands of coloured words of code, mathematics, contrast) are left to a few pages, below.
    """
    entries = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))
    found = {}
    page = context.new_page()
    errors, requests = listen(page)
    for entry in [*entries, "search", "genindex"]:
        errors.clear()
        requests.clear()
        page.goto(f"{plain_site}/{entry}.html")
        page.evaluate("for (const code of document.querySelectorAll('pre, .sig')) code.textContent = code.textContent")
        found[entry] = {"violations": violations(page, contrast=False), "errors": [*errors], "requests": [*requests]}
    page.close()
    return found


def test_no_page_has_a_console_error(read_pages: dict[str, dict[str, list[str]]]) -> None:
    assert not {entry: found["errors"] for entry, found in read_pages.items() if found["errors"]}


def test_no_request_leaves_the_machine(read_pages: dict[str, dict[str, list[str]]], plain_site: str) -> None:
    requests = {url for found in read_pages.values() for url in found["requests"]}
    assert len(requests) > len(read_pages)
    assert not [url for url in requests if not url.startswith((f"{plain_site}/", "data:", "blob:"))]


def test_axe_finds_no_serious_violation(read_pages: dict[str, dict[str, list[str]]]) -> None:
    assert not {entry: found["violations"] for entry, found in read_pages.items() if found["violations"]}


@pytest.mark.parametrize(
    ("entry", "theme"), [("01_nice", "light"), ("clinic", "dark"), ("playground", "light"), ("playground", "dark")]
)
def test_axe_finds_nothing_in_a_whole_page(site: str, context: BrowserContext, entry: str, theme: str) -> None:
    """Code, mathematics and all colours are included, and the page reports no error."""
    page = context.new_page()
    page.emulate_media(color_scheme=theme)
    errors, _ = listen(page)
    page.goto(f"{site}/chapters/{entry}.html")
    page.locator("mjx-container").first.wait_for()
    assert not violations(page)
    assert not errors
    page.close()


def test_search_finds_dequantization(plain_site: str, context: BrowserContext) -> None:
    """A reader searches with Ctrl-K on any page, types the word, presses Enter, and follows the first result."""
    page = context.new_page()
    page.goto(f"{plain_site}/chapters/01_nice.html")
    page.keyboard.press("Control+k")
    page.locator("input[type=search]:visible").fill("dequantization")
    page.keyboard.press("Enter")
    results = page.locator("#search-results li a")
    results.first.wait_for()
    # The page adds one result after another: wait for the chapter's result, which must be among them.
    page.locator("#search-results li a[href*='02_dequantization.html']").first.wait_for()
    assert any("02_dequantization.html" in link.get_attribute("href") for link in results.all())
    results.first.click()
    assert page.get_by_role("heading", level=1).inner_text().strip()
    page.close()


def test_solutions_unfold(plain_site: str, context: BrowserContext) -> None:
    """Each solution is closed until the reader opens it, by mouse or by keyboard."""
    page = context.new_page()
    page.goto(f"{plain_site}/chapters/02_dequantization.html")
    buttons = page.locator("div.solution button.toggle-button")
    assert buttons.count() >= 3
    for button in buttons.all():
        body = button.locator("xpath=ancestor::div[contains(@class, 'solution')]").locator("section, .section").first
        assert not body.is_visible()
        button.focus()
        page.keyboard.press("Enter")
        body.wait_for(state="visible")
    page.close()


def test_mathematics_is_typeset_from_the_files_alone(book: Path, browser: Browser) -> None:
    page = browser.new_page()
    page.goto((book / "chapters" / "01_nice.html").as_uri())
    page.locator("mjx-container").first.wait_for()
    page.close()


def test_a_sheet_of_frames_becomes_one_frame_with_a_slider(book: Path, browser: Browser) -> None:
    page = browser.new_page()
    leave_out_mathematics(page)
    page.goto((book / "chapters" / "03_realnvp.html").as_uri())
    view = page.locator(".frames-view").first
    frame, image = view.bounding_box(), view.locator("img").bounding_box()
    assert image["width"] == pytest.approx(4 * frame["width"], rel=0.01)
    assert frame["width"] == pytest.approx(frame["height"], rel=0.01)
    assert len(view.locator("img").get_attribute("alt")) > 10
    where = page.locator(".frames-bar output").first
    assert where.inner_text() == "1 of 8"
    page.get_by_role("button", name="next frame").first.click()
    assert where.inner_text() == "2 of 8"
    assert view.locator("img").bounding_box()["x"] == pytest.approx(frame["x"] - frame["width"], abs=1)
    page.close()
