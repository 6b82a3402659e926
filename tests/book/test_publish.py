"""The repository's address turns on the links to edit a page and to open it in Colab; without it nothing shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import publish
import pytest
from notebooks import check
from reading import bound_again, length

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
READER = "https://github.com/reader/course"
LONG = f"https://github.com/{'owner' * 7}/{'name' * 20}"


def config(folder: Path, address: str) -> Path:
    """A copy of the book's settings with another address."""
    text = (ROOT / "_config.yml").read_text(encoding="utf-8")
    settings = f'repository:\n  url: "{address}"\n'
    text, changed = re.subn(r"^repository:\n(?:  .*\n)+", settings, text, flags=re.MULTILINE)
    assert changed == 1
    (folder / "_config.yml").write_text(text, encoding="utf-8")
    return folder / "_config.yml"


def links(page: Path) -> list[str]:
    """The addresses on the page at which a repository is edited or opened."""
    found = re.findall(r'href="(https://[^"]+)"', page.read_text(encoding="utf-8"))
    return [link for link in found if "/edit/" in link or link.startswith(publish.COLAB)]


# --- the address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["", READER, LONG])
def test_an_address_is_read(tmp_path: Path, address: str) -> None:
    assert publish.repository(config(tmp_path, address)) == address


@pytest.mark.parametrize(
    "address",
    [
        "reader/course",
        "http://github.com/reader/course",
        "https://gitlab.com/reader/course",
        "https://github.com/reader",
        "https://github.com/reader/course/",
        "https://github.com/reader/course.git",
        "https://github.com/reader/course/tree/main",
        "https://github.com/reader/course?x",
    ],
)
def test_a_wrong_address_is_an_error_that_names_it(tmp_path: Path, address: str) -> None:
    expected = f"repository: expected https://github.com/OWNER/NAME or empty, got '{address}'"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        publish.repository(config(tmp_path, address))


def test_the_workflow_publishes_the_branch_of_the_links() -> None:
    workflow = (ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8")
    assert f"branches: [{publish.BRANCH}]" in workflow
    assert f"if: github.ref == 'refs/heads/{publish.BRANCH}'" in workflow


# --- the links --------------------------------------------------------------------------------------------------------


def test_the_books_pages_link_to_the_repository_exactly_if_there_is_an_address(book: Path) -> None:
    address = publish.repository(ROOT / "_config.yml")
    for entry in re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8")):
        notebook = (ROOT / f"{entry}.ipynb").is_file()
        expected = (1 + notebook) if address else 0
        assert len(links(book / f"{entry}.html")) == expected, entry
    assert links(book / "search.html") == links(book / "genindex.html") == []
    labels = r"(?:source|launch)-\w+(?:-button)?s?\b"
    pages = [path.read_text(encoding="utf-8") for path in book.rglob("*.html")]
    assert any(re.search(rf'class="[^"]*btn-{labels}', page) for page in pages) == bool(address)


def test_with_an_address_a_page_can_be_edited_and_a_notebook_opened_in_colab(tmp_path: Path) -> None:
    """A small book has the settings of the book, an address, a page in Markdown and a notebook."""
    config(tmp_path, READER)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: chapters/page\nchapters:\n- file: chapters/notebook\n")
    for folder in ("_extra", "_static", "chapters", "tools"):
        (tmp_path / folder).mkdir()
    for name in ("_static/favicon.svg", "chapters/references.bib", "tools/publish.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "chapters" / "page.md").write_text("# A page\n")
    cells = [nbformat.v4.new_markdown_cell("# A notebook", id="a"), nbformat.v4.new_code_cell("answer = 42", id="b")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=metadata))
    (tmp_path / "chapters" / "notebook.ipynb").write_text(publish.with_first_cell(notebook, READER))
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-W", "-n", "--keep-going"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    pages = tmp_path / "_build" / "html" / "chapters"
    edit = f"{READER}/edit/main/chapters"
    assert links(pages / "page.html") == [f"{edit}/page.md"]
    in_colab = f"{publish.COLAB}/github/reader/course/blob/main/chapters/notebook.ipynb"
    assert sorted(links(pages / "notebook.html")) == [in_colab, f"{edit}/notebook.ipynb"]
    assert links(pages.parent / "search.html") == []
    shown = (pages / "notebook.html").read_text(encoding="utf-8")
    assert "answer" in shown and "sys.modules" not in shown and "cell_output" not in shown


# --- the first cell ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_the_first_cell_of_the_books_address(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    expected = publish.with_first_cell(text, publish.repository(ROOT / "_config.yml"))
    assert text == expected, "the chapter is not as _config.yml says: run `make colab`"


def test_the_first_cell_comes_and_goes_and_leaves_nothing() -> None:
    for path in CHAPTERS:
        text = path.read_text(encoding="utf-8")
        bare = publish.with_first_cell(text, "")
        with_cell = publish.with_first_cell(bare, READER)
        assert READER not in bare
        assert publish.with_first_cell(with_cell, READER) == with_cell
        assert publish.with_first_cell(publish.with_first_cell(with_cell, LONG), "") == bare
        code = [cell for cell in json.loads(with_cell)["cells"] if cell["cell_type"] == "code"]
        assert READER in "".join(code[0]["source"])
        assert READER not in "".join(line for cell in code[1:] for line in cell["source"])


def test_a_chapter_with_the_first_cell_is_in_order(tmp_path: Path) -> None:
    """It has the normal form and passes ruff; it is not longer to read; the cell binds no name of the chapter."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "chapters").mkdir()
    shutil.copy(ROOT / "chapters" / "ruff.toml", tmp_path / "chapters")
    for path in CHAPTERS:
        text = path.read_text(encoding="utf-8")
        made = tmp_path / "chapters" / path.name
        made.write_text(publish.with_first_cell(text, LONG), encoding="utf-8")
        assert check(made) == []
        notebook = nbformat.read(made, as_version=4)
        bare = nbformat.reads(publish.with_first_cell(text, ""), as_version=4)
        assert length(notebook) == length(bare)
        assert bound_again(notebook) == {}
    for command in (["check"], ["format", "--check"]):
        ruff = [Path(sys.executable).with_name("ruff"), *command, "--no-cache", "chapters"]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def run(source: str, folder: Path) -> str:
    """What the source prints in a new interpreter in the folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_cell_does_nothing_outside_colab(tmp_path: Path) -> None:
    cell = "".join(publish.first_cell(READER)["source"])
    printed = run(f"import sys\nbefore = [*sys.path]\n{cell}\nprint(sys.path == before)", tmp_path)
    assert printed == "True\n"
    assert not list(tmp_path.iterdir())


def test_the_first_cell_gets_the_library_and_the_records_in_colab(tmp_path: Path) -> None:
    """In a pretended Colab the library is imported from the clone and finds the records there; twice is as good."""
    origin = tmp_path / "origin"
    records = "data/ablations"
    for folder in ("nflows_lib", records):
        shutil.copytree(ROOT / folder, origin / folder, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(origin), "-c", "user.name=a reader", "-c", "user.email=reader@localhost"]
    for command in (["init", "-q", "-b", publish.BRANCH], ["add", "."], ["commit", "-q", "-m", "The course"]):
        subprocess.run([*git, *command], check=True)
    cell = "".join(publish.first_cell(origin.as_uri())["source"])
    content = tmp_path / "content"
    content.mkdir()
    source = (
        f"import sys\nsys.modules['google.colab'] = sys\n{cell}\n{cell}\n"
        "from nflows_lib.experiments import archive\n"
        f"print(archive.__file__)\nprint(len(list((archive.ROOT / '{records}').glob('*.json'))))"
    )
    place, count = run(source, content).splitlines()
    assert place == str(content / "nflows-course" / "nflows_lib" / "experiments" / "archive.py")
    assert int(count) == len(list((ROOT / records).glob("*.json"))) > 0
