"""The book as one PDF, printed once: nothing is cut off, folded or dead, and everything of the site is in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import chromium
import pdf
import pytest
from playwright.sync_api import Browser

MAX_BYTES = 20_000_000
# A title of the outline: text in parentheses, with escapes, or UTF-16 in hexadecimal digits.
TITLE = rb"/Title (?:\(((?:\\.|[^\\)])*)\)|<([0-9A-Fa-f]*)>)"

# What the browser finds before it prints, on the site's pages and on the one page that it will print.
FACTS = """async () => {
  const names = [...document.querySelectorAll("main > article")].map((article) => article.id);
  const texts = await Promise.all(names.map((name) => fetch(`${name}.html`).then((answer) => answer.text())));
  const read = (text) => new DOMParser().parseFromString(text, "text/html").querySelector("article.bd-article");
  const [site, paper] = [texts.map(read), [document.querySelector("main")]];
  const all = (roots, selector) => roots.flatMap((root) => [...root.querySelectorAll(selector)]);
  const both = (count) => [count(site), count(paper)];
  const words = (element) => element.textContent.replace(/#$/, "").trim();
  const named = (element) => `${element.closest("article")?.id}: ${element.outerHTML.slice(0, 120)}`;
  const edge = document.documentElement.clientWidth + 1;
  const wide = (element) => element.getBoundingClientRect().right > edge
    || (element.clientWidth && element.scrollWidth > element.clientWidth + 2);
  const states = (root) => new Set(all([root], "a[href*='.html#']")
    .filter((link) => link.getAttribute("href").includes("=") && !link.closest("flow-trainer"))
    .map((link) => link.closest("p")));
  const painted = (box) => {
    const style = getComputedStyle(box);
    return style.breakInside === "auto"
      && (style.backgroundColor !== "rgba(0, 0, 0, 0)" || parseFloat(style.borderLeftWidth) > 0);
  };
  const loose = (text) => [...text.childNodes].some((node) => node.nodeType === Node.TEXT_NODE
    && /\\d %/.test(node.data));
  const dead = (href) => href?.startsWith("#")
    ? !document.getElementById(decodeURIComponent(href.slice(1))) : !/^(https?|mailto):/.test(href);
  return {
    names,
    outline: all(site, "h1, h2, h3").map((heading) => [Number(heading.tagName[1]), words(heading)]),
    code: both((roots) => all(roots, "pre").map((code) => code.textContent).join("")),
    captions: both((roots) => all(roots, ".caption-number").map(words).sort().join(", ")),
    pictures: both((roots) => all(roots, "img").length),
    solutions: both((roots) => all(roots, ".solution, details:not(.above-input), .folded").length),
    formulas: [all(site, ".math").length, all(paper, ".math > mjx-container").length],
    states: [site.reduce((sum, root) => sum + states(root).size, 0),
      all(paper, "p").filter((text) => text.textContent.includes("(on the site)")).length],
    painted: all(paper, "div, section, pre:not(.long)").filter(painted).map(named),
    loose: all(paper, "p, li, td, dd").filter(loose).map(named),
    wrong: all(paper, "mjx-merror, [data-mjx-error]").map(named),
    folded: all(paper, "details, button").map(named)
      .concat(all(paper, ".solution, .folded").filter((box) => box.clientHeight < 60).map(named)),
    dead: all(paper, "a").map((link) => link.getAttribute("href")).filter(dead),
    wide: all(paper, "pre, table, figure, img, mjx-container, figcaption, caption, p, li, dt, dd, h1, h2, h3")
      .filter(wide).map(named),
  };
}"""


class Printed(NamedTuple):
    """The file, and what the browser found before it printed."""

    pdf: bytes
    facts: dict[str, Any]
    numbers: dict[str, int]  # the page that the contents name, by the link's target


@pytest.fixture(scope="module")
def printed(book: Path, browser: Browser) -> Printed:
    page = pdf.opened(browser, book)
    facts = page.evaluate(FACTS)
    file = pdf.printed(page)
    lines = (
        "[...document.querySelectorAll('.contents a')].map((link) => [link.hash.slice(1), Number(link.dataset.page)])"
    )
    numbers = dict(page.evaluate(lines))
    page.close()
    return Printed(file, facts, numbers)


def bookmarks(file: bytes) -> list[tuple[int, str]]:
    """The outline of a file that Chromium printed, as levels from 1 and titles, in its order."""

    def item(number: bytes) -> bytes:
        start = file.rindex(b"\n%b 0 obj\n" % number)  # Chromium writes the outline last
        return file[start : file.index(b"\nendobj", start)]

    def title(literal: bytes, digits: bytes) -> str:
        if digits:
            return bytes.fromhex(digits.decode()).decode("utf-16")
        octal = re.sub(rb"\\(\d{3})", lambda match: bytes([int(match[1], 8)]), literal)
        return re.sub(rb"\\(.)", rb"\1", octal).decode("latin-1")

    def below(parent: bytes, level: int) -> list[tuple[int, str]]:
        found, following = [], re.search(rb"/First (\d+) 0 R", parent)
        while following:
            entry = item(following[1])
            literal, digits = re.search(TITLE, entry, re.DOTALL).groups()
            found += [(level, title(literal or b"", digits or b"")), *below(entry, level + 1)]
            following = re.search(rb"/Next (\d+) 0 R", entry)
        return found

    return below(item(re.search(rb"/Outlines (\d+) 0 R", file)[1]), 1)


def test_the_file_is_light(printed: Printed) -> None:
    assert printed.pdf.startswith(b"%PDF-")
    assert 100 < len(pdf.pages_in(printed.pdf)) < 600
    assert len(printed.pdf) < MAX_BYTES


def test_the_outline_is_that_of_the_site(printed: Printed) -> None:
    """Every page of the contents, in order, with its sections below it."""
    toc = (pdf.ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert printed.facts["names"] == [Path(file).name for file in re.findall(r"(?:root|file): (\S+)", toc)]
    contents, *found = bookmarks(printed.pdf)
    assert contents == (1, "Contents")
    assert [list(entry) for entry in found] == printed.facts["outline"]


def test_every_link_leads_somewhere(printed: Printed) -> None:
    assert not printed.facts["dead"]
    places = pdf.places(printed.pdf)
    links = [name.decode() for name in re.findall(rb"/Dest /(\S+)", printed.pdf)]
    assert len(links) > 1000
    assert set(links) <= places.keys()
    outside = re.findall(rb"/URI \((.+?)\)", printed.pdf)
    assert len(outside) > 100
    assert not [address for address in outside if address.startswith(pdf.HOST.encode())]


def test_the_contents_name_the_right_pages(printed: Printed) -> None:
    places = pdf.places(printed.pdf)
    assert printed.numbers == {name: places[name] for name in printed.numbers}
    assert printed.facts["names"] == [name for name in printed.numbers if "--" not in name]
    assert [*printed.numbers.values()] == sorted(printed.numbers.values())
    assert len(printed.numbers) == sum(level <= 2 for level, _ in printed.facts["outline"])


def test_nothing_is_cut_off(printed: Printed) -> None:
    """No code, table, figure, formula or text is wider than its column of the paper."""
    assert not printed.facts["wide"]


def test_no_box_runs_on_below_its_content(printed: Printed) -> None:
    """A page break stretches a split box to the foot of its page: a box with a colour or a rail does not split."""
    assert not printed.facts["painted"]


def test_a_link_to_a_state_of_the_playground_says_that_the_site_has_it(printed: Printed) -> None:
    site, paper = printed.facts["states"]
    assert site == paper > 10


def test_no_line_starts_with_a_percent_sign(printed: Printed) -> None:
    assert not printed.facts["loose"]


def test_nothing_is_folded(printed: Printed) -> None:
    assert not printed.facts["folded"]
    site, paper = printed.facts["solutions"]
    assert site == paper > 30


@pytest.mark.parametrize(("kind", "least"), [("code", 300_000), ("captions", 1000)])
def test_no_code_and_no_caption_is_missing(printed: Printed, kind: str, least: int) -> None:
    site, paper = printed.facts[kind]
    assert site == paper
    assert len(site) > least


def test_no_picture_is_missing(printed: Printed) -> None:
    site, paper = printed.facts["pictures"]
    assert site == paper > 100


def test_every_formula_is_typeset(printed: Printed) -> None:
    site, paper = printed.facts["formulas"]
    assert site == paper > 1500
    assert not printed.facts["wrong"]


def test_the_site_offers_the_file_once_it_is_printed(book: Path, tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "chapters").mkdir()
    index = Path(shutil.copy(book / "chapters" / "index.html", tmp_path / "chapters"))
    assert index.read_text(encoding="utf-8").count('<p id="whole-book" hidden>') == 1
    for _ in range(2):  # a second print changes nothing
        pdf.offer(tmp_path, printed.pdf)
        sentence = re.search(r'<p id="whole-book">(.+?)</p>', index.read_text(encoding="utf-8"))[1]
        assert f'<a href="../{pdf.NAME}">' in sentence
        assert f"({len(pdf.pages_in(printed.pdf))} pages, {len(printed.pdf) / 1e6:.0f} MB)" in sentence
    index.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a paragraph whole-book in index\.html"):
        pdf.offer(tmp_path, printed.pdf)


def test_the_title_page_names_the_source_of_a_published_copy() -> None:
    toc = {"root": "chapters/index", "parts": [{"caption": "A", "chapters": [{"file": "b"}, {"file": "c"}]}]}
    config = {"title": "T", "author": "A", "copyright": "2026"}
    book = pdf.contents(config, toc)
    assert book["licence"] == pdf.LICENCE
    assert [tuple(page.values()) for page in book["pages"]] == [("index", ""), ("b", "A"), ("c", "")]
    published = pdf.contents({**config, "repository": {"url": "https://example.org/copy"}}, toc)
    assert published["licence"].endswith("The source is at https://example.org/copy.")


def test_what_is_missing_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "SITE", tmp_path)
    monkeypatch.setenv("CHROMIUM", "kromium")
    with pytest.raises(SystemExit, match=r"^the environment variable CHROMIUM is 'kromium', which is no program$"):
        pdf.main()
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"^There is no Chromium .+ \(on Debian: apt-get install chromium\)\. .+$"):
        pdf.main()
    monkeypatch.setattr(chromium, "find", lambda: "chromium")
    with pytest.raises(SystemExit, match=r"^The book is not built yet: run `make book` first"):
        pdf.main()
