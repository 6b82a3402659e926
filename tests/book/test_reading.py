"""A chapter is read in the time that its box says and keeps to its limits; no text has a word that says too little."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from reading import MAX_LINES, MAX_SECTION_WORDS, MAX_WORDS, bound_again, length, parts

CHAPTERS = Path(__file__).parents[2] / "chapters"

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


@pytest.mark.parametrize("chapter", sorted(path.stem for path in CHAPTERS.glob("0*.ipynb")))
def test_a_chapter_keeps_to_the_limits(chapter: str) -> None:
    found = length(read(chapter))
    assert found.words <= MAX_WORDS
    assert found.lines <= MAX_LINES
    assert {heading: words for heading, words in found.sections.items() if words > MAX_SECTION_WORDS} == {}


@pytest.mark.parametrize("chapter", sorted(path.stem for path in CHAPTERS.glob("*.ipynb")))
def test_no_name_is_given_to_two_things(chapter: str) -> None:
    assert bound_again(read(chapter)) == {}


def test_all_text_avoids_words_that_say_too_little(tracked_texts: dict[Path, str]) -> None:
    """Pages, code with its comments, and stored outputs; records keep what was printed when they were made."""
    found = []
    for path, content in tracked_texts.items():
        if path.suffix in {".json", ".lock", ".bib"} or path == Path(__file__):
            continue
        text = "\n".join(parts(path.name, content).values())
        found += [(path.name, text[max(hit.start() - 40, 0) : hit.end() + 40]) for hit in AVOIDED.finditer(text)]
    assert found == []
