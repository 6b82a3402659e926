"""A chapter can be read in the time that its box says, and the edited pages keep to their limits and their words."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from reading import MAX_LINES, MAX_SECTION_WORDS, MAX_WORDS, bound_again, length, parts

ROOT = Path(__file__).parents[2]
CHAPTERS = ROOT / "chapters"

# What has been edited so far. The next edit adds its pages here.
EDITED_CHAPTERS = ["01_nice", "02_dequantization", "04_multiscale"]
EDITED_PAGES = [
    *(f"chapters/{name}.ipynb" for name in EDITED_CHAPTERS),
    *(f"chapters/{name}.md" for name in ("index", "playground", "clinic", "glossary", "notation")),
    *(f"chapters/{name}.md" for name in ("running", "beyond", "full_scale")),
    "README.md",
    "CONTRIBUTING.md",
]

# Words that say too little. A line with a tick is a sentence of its own: none begins with a word that points back.
AVOIDED = re.compile(
    r"\b[Mm]end|\b[Ww]hence\b|\b[Aa]fresh\b|\b[Aa]new\b|\b[Cc]odes\b|left out \| put back|An identity"
    r"|✓ (?:and|it|that|which|so|they|also)\b|± ≈|\b1 CPU threads"
)


def read(chapter: str) -> nbformat.NotebookNode:
    return nbformat.read(CHAPTERS / f"{chapter}.ipynb", as_version=4)


@pytest.mark.parametrize("chapter", sorted(path.stem for path in CHAPTERS.glob("0*.ipynb")))
def test_the_box_says_how_long_the_chapter_is_to_read(chapter: str) -> None:
    notebook = read(chapter)
    said = re.search(r"\*\*Time to read\*\*: (\d+) minutes", notebook.cells[0].source)
    assert said and int(said[1]) == length(notebook).minutes


@pytest.mark.parametrize("chapter", EDITED_CHAPTERS)
def test_an_edited_chapter_keeps_to_the_limits(chapter: str) -> None:
    found = length(read(chapter))
    assert found.words <= MAX_WORDS
    assert found.lines <= MAX_LINES
    assert {heading: words for heading, words in found.sections.items() if words > MAX_SECTION_WORDS} == {}


@pytest.mark.parametrize("chapter", sorted(path.stem for path in CHAPTERS.glob("*.ipynb")))
def test_no_name_is_given_to_two_things(chapter: str) -> None:
    assert bound_again(read(chapter)) == {}


@pytest.mark.parametrize("page", EDITED_PAGES)
def test_an_edited_page_avoids_words_that_say_too_little(page: str) -> None:
    text = "\n".join(parts(page, (ROOT / page).read_text(encoding="utf-8")).values())
    assert [text[max(found.start() - 40, 0) : found.end() + 40] for found in AVOIDED.finditer(text)] == []
