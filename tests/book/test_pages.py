"""The companion pages are true: the clinic's report, entries and pictures, the path, the page on the library."""

from __future__ import annotations

import contextlib
import io
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import thumbnails
from PIL import Image

import nflows_lib
from nflows_lib import experiments
from nflows_lib.clinic.registry import TESTS

ROOT = Path(__file__).parents[2]
CHAPTERS = ROOT / "chapters"

CLINIC = (CHAPTERS / "clinic.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def test_the_clinics_report_is_what_its_code_prints() -> None:
    code, report = (re.search(rf"```{kind}\n(.+?)```", CLINIC, re.DOTALL)[1] for kind in ("python", "text"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "clinic.md", "exec"), {"__name__": "clinic"})
    shown, now = ([NUMBER.sub("#", line) for line in text.splitlines()] for text in (report, printed.getvalue()))
    assert shown == now
    assert max(map(len, report.splitlines())) <= 84  # the page shows this width without scrolling


def test_every_entry_that_the_doctor_names_is_in_the_clinic() -> None:
    named = {entry for test in TESTS for entry in test.finds}
    entries = {
        f"{kind.upper()}{number}" for kind, number in re.findall(r"^\(clinic-([fp])(\d+)\)=", CLINIC, re.MULTILINE)
    }
    assert named <= entries
    assert {f"F{i}" for i in range(1, 29)} | {f"P{i}" for i in range(17, 32)} <= entries


def test_every_entry_has_cause_test_and_fix() -> None:
    """The entries about what is no fault, N1 to N5, have an answer instead."""
    entries = re.split(r"^\(clinic-", CLINIC.split("\n## Seen in public code")[0], flags=re.MULTILINE)[1:]
    answers = [entry[:2] for entry in entries if entry.startswith("n")]
    assert answers == ["n1", "n2", "n3", "n4", "n5"]
    for entry in entries:
        for part in ("**Answer.**",) if entry[:2] in answers else ("**Cause.**", "**Test.**", "**Fix.**"):
            assert part in entry, f"{entry.splitlines()[1]}: expected {part}"
    failures = [entry for entry in entries if entry.startswith("f")]
    assert all("assets/clinic/" in entry and ":alt:" in entry for entry in failures)
    assert all(re.search(r"\{(?:ref|numref)\}`[^`]*(?:sec|fig)-", entry) for entry in failures)


def test_every_entry_is_reached_from_what_the_reader_sees() -> None:
    """One table or another under "What do you see?" links every entry, so that a reader needs one step."""
    tables = CLINIC.split("\n## What do you see?\n")[1].split("\n## ")[0]
    linked = set(re.findall(r"\{ref\}`(\w+) <clinic-\w+>`", tables))
    headings = re.findall(r"^\(clinic-\w+\)=\n### (\w+)\. ", CLINIC, re.MULTILINE)
    assert linked == set(headings) and len(headings) == CLINIC.count("\n(clinic-")


def test_what_was_seen_in_the_wild_is_linked() -> None:
    """Each line of this kind is behind a fix or answer and links threads by the repository and the number."""
    lines = re.findall(r"^\*\*(?:Fix|Answer)\.\*\*.*\n\n\*\*Seen in the wild\.\*\* (.*)$", CLINIC, re.MULTILINE)
    assert len(lines) == CLINIC.count("**Seen in the wild.**") >= 30
    for line in lines:
        links = re.findall(r"\[([\w./-]+) (\d+)\]\(https://github\.com/([\w./-]+)/(?:issues|pull)/(\d+)\)", line)
        assert links and len(links) == line.count("](")
        assert all((name, number) == (repository, thread) for name, number, repository, thread in links)


def test_a_failure_has_one_title_in_its_chapter_and_in_the_clinic() -> None:
    """Every failure has a card in a chapter and an entry in the clinic, and both have the same title."""
    cards = {}
    for path in sorted(CHAPTERS.glob("0*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                cards.update(re.findall(r"\{admonition\} (F\d+)\. (.+)", "".join(cell["source"])))
    headings = dict(re.findall(r"^### (F\d+)\. (.+)$", CLINIC, re.MULTILINE))
    assert headings == cards


@pytest.mark.parametrize("failure", thumbnails.SOURCES)
def test_a_thumbnail_is_its_chapters_figure(failure: str) -> None:
    """A stored thumbnail equals its figure up to the noise of another run; tools/thumbnails.py cuts it again."""
    stored = Image.open(thumbnails.FOLDER / f"{failure}.png").convert("L").resize((48, 48))
    now = thumbnails.thumbnail(failure).convert("L").resize((48, 48))
    assert np.abs(np.asarray(stored, float) - np.asarray(now, float)).mean() < 6


def test_the_path_gives_the_chapters_own_times() -> None:
    page = (CHAPTERS / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| .*<(\d\d_\w+)>.*<br>(\d+) minutes \|", page, re.MULTILINE)
    assert [name for name, _ in rows] == sorted(path.stem for path in CHAPTERS.glob("0*.ipynb"))
    for name, read in rows:
        cells = json.loads((CHAPTERS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        box = "".join(cells[0]["source"])
        assert f"**Time to read**: {read} minutes" in box
        assert "**Time to run**: under a minute on one CPU core" in box
    hours = {4: "four", 5: "five", 6: "six"}[round(sum(int(read) for _, read in rows) / 60)]
    assert f"Reading all seven chapters takes about {hours} hours" in page
    assert "Each chapter runs in under a minute on one CPU core" in page


def test_the_page_on_the_library_has_every_module() -> None:
    """Command lines, the modules inside the clinic, and the single ablations are exempt."""
    page = (CHAPTERS / "api.md").read_text(encoding="utf-8")
    modules = {module.name for module in pkgutil.iter_modules(nflows_lib.__path__)} - {"experiments"}
    modules |= {f"experiments.{module.name}" for module in pkgutil.iter_modules(experiments.__path__)}
    modules.add("experiments.ablations.experiment")
    listed = set(re.findall(r"automodule:: nflows_lib\.([\w.]+)", page))
    assert listed == modules - {"__main__", "notebook", "ablations", "experiments.command", "experiments.notebooks"}
    assert set(re.findall(r"py:mod\}`~nflows_lib\.([\w.]+)`", page)) == listed
