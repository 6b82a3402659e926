"""Print the built book as one PDF: ``python tools/pdf.py``, after ``make book``; `make pdf` does both.

`tools/pdf.js` puts all pages of `_toc.yml` into one page, with a title page and the contents before them. Links between
pages become links inside that page, and whatever is folded is opened. Chromium prints it in the style of
`tools/pdf.css`. The file lands next to the site, whose first page then offers it.
"""

from __future__ import annotations

import json
import re
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import matplotlib
import yaml

import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
NAME = "normalizing-flows.pdf"
FONTS = Path(matplotlib.get_data_path())
HOST = "http://book"  # an address for the browser alone: send() answers it with files
ADDRESS = f"{HOST}/chapters/whole-book.html"  # next to the pages, so that their relative addresses hold
WIDTH = round((210 - 2 * 17) / 25.4 * 96)  # of an A4 page between its margins, in pixels
LICENCE = "The text and the figures are under the licence CC BY 4.0, the code is under the MIT licence."

MATHEMATICS = {
    "startup": {"typeset": False},  # pdf.js typesets once all pages are together
    "chtml": {"matchFontHeight": False, "scale": 1.04},
    "options": {
        "processHtmlClass": "math",
        "enableMenu": False,
        "renderActions": {"assistiveMml": []},  # a second, invisible form of each formula
    },
}
SKELETON = """<!doctype html>
<html lang="en" data-theme="light">
<head><meta charset="utf-8"><title>{title}</title>
<link rel="stylesheet" href="../_static/pygments.css"><link rel="stylesheet" href="../tools/pdf.css">
<script>window.MathJax = {mathematics}</script>
<script defer src="../_static/mathjax/tex-chtml.js"></script><script defer src="../tools/pdf.js"></script></head>
<body class="mathjax_ignore"></body></html>"""


def contents(config: dict[str, Any], toc: dict[str, Any]) -> dict[str, Any]:
    """What pdf.js needs: the book's title, author and year, a line on its licence and source, and its pages in order.

    Args:
        config: the content of `_config.yml`.
        toc: the content of `_toc.yml`.
    """
    pages = [{"name": Path(toc["root"]).name, "part": ""}]
    for part in toc["parts"]:
        for i, chapter in enumerate(part["chapters"]):
            caption = part["caption"] if i == 0 else ""
            pages.append({"name": Path(chapter["file"]).name, "part": caption})
    source = config.get("repository", {}).get("url", "")
    return {
        "title": config["title"],
        "author": config["author"],
        "year": config["copyright"],
        "licence": f"{LICENCE} The source is at {source}." if source else LICENCE,
        "pages": pages,
    }


def send(route: Route, site: Path, skeleton: str) -> None:
    """Answer a request of the browser with a file of the site, of this folder, or of matplotlib's fonts."""
    if route.request.url == ADDRESS:
        route.fulfill(body=skeleton, content_type="text/html; charset=utf-8")
        return
    path = unquote(urlsplit(route.request.url).path).lstrip("/")
    folder = {"tools": ROOT, "fonts": FONTS}.get(path.partition("/")[0], site)
    file = folder / path
    route.fulfill(body=file.read_bytes(), content_type=guess_type(file.name)[0] or "application/octet-stream")


def opened(browser: Browser, site: Path) -> Page:
    """The whole book in the browser, as it will be printed, with its formulas typeset."""
    config, toc = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in ("_config.yml", "_toc.yml"))
    book = contents(config, toc)
    skeleton = SKELETON.format(title=book["title"], mathematics=json.dumps(MATHEMATICS))
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.emulate_media(media="print")
    page.route(f"{HOST}/**", lambda route: send(route, site, skeleton))
    page.goto(ADDRESS)
    page.evaluate("book => build(book)", book)
    return page


def pages_in(pdf: bytes) -> list[bytes]:
    """The pages of a file that Chromium printed, in order, each as the number of its object."""
    return re.findall(rb"\n(\d+) 0 obj\n<</Type /Page\n", pdf)


def places(pdf: bytes) -> dict[str, int]:
    """The page, from 1, of each target of a link inside a file that Chromium printed, by the target's name."""
    number = re.search(rb"/Dests (\d+) 0 R", pdf)[1]
    targets = re.search(rb"\n%b 0 obj\n<<(.*?)>>\nendobj" % number, pdf, re.DOTALL)[1]
    pages = {page: i for i, page in enumerate(pages_in(pdf), start=1)}
    return {name.decode(): pages[page] for name, page in re.findall(rb"/(\S+) \[(\d+) 0 R", targets)}


def printed(page: Page) -> bytes:
    """The PDF of the opened book: a first print says on which pages its parts are, a second one has these in its contents.

    The first print draws nothing, which halves its time and moves nothing.
    """
    options = {"prefer_css_page_size": True, "print_background": True}
    page.evaluate("document.body.style.visibility = 'hidden'")
    page.evaluate("places => number(places)", places(page.pdf(**options)))
    page.evaluate("document.body.style.visibility = ''")
    return page.pdf(**options, tagged=True, outline=True)


def offer(site: Path, pdf: bytes) -> None:
    """Let the site's first page offer the PDF, which stands next to the site. Its sentence is hidden until then."""
    index = site / "chapters" / "index.html"
    size = f" ({len(pages_in(pdf))} pages, {len(pdf) / 1e6:.0f} MB)"

    def show(sentence: re.Match[str]) -> str:
        text = re.sub(r"<a[^>]*>", f'<a href="../{NAME}">', sentence[1])
        return f'<p id="whole-book">{re.sub(r"<span>.*?</span>", f"<span>{size}</span>", text)}</p>'

    text, found = re.subn(r'<p id="whole-book"[^>]*>(.*?)</p>', show, index.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"site: expected a paragraph whole-book in {index.name}, came none")
    index.write_text(text, encoding="utf-8")


def main() -> None:
    """Print the book and offer it on the site."""
    path = chromium.require()
    if not (SITE / "chapters" / "index.html").is_file():
        raise SystemExit("The book is not built yet: run `make book` first, or `make pdf`, which does both.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=chromium.ARGUMENTS)
        pdf = printed(opened(browser, SITE))
        browser.close()
    (SITE / NAME).write_bytes(pdf)
    offer(SITE, pdf)
    print(f"The book is printed, {len(pages_in(pdf))} pages, {len(pdf) / 1e6:.1f} MB. Open {SITE / NAME}")


if __name__ == "__main__":
    main()
