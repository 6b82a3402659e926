"""Give the book its repository's address: ``python tools/publish.py`` (``make colab``), and an extension of Sphinx.

The address stands in ``_config.yml`` under ``repository``. As an extension, this module turns on the links to edit a
page and to open a chapter in Colab. As a script, it gives each chapter the first code cell that installs the course
in Colab. An empty address turns off the links and removes the cells.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

ROOT = Path(__file__).parents[1]
COLAB = "https://colab.research.google.com"
BRANCH = "main"  # the branch that .github/workflows/book.yml publishes
CELL = "colab"  # the id of the cell

# The course is cloned, not installed by pip, because the chapters also read the records in data/ and benchmarks/.
SOURCE = """\
# Colab has PyTorch and the other packages, but not the course. This cell gets the
# library and the records from the course's repository. Outside Colab it does nothing.
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    checkout = Path("nflows-course").resolve()
    if not checkout.is_dir():
        address = "{address}"
        clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", "{branch}"]
        subprocess.run([*clone, address, checkout], check=True)
    sys.path.insert(0, str(checkout))
"""


def repository(config: Path) -> str:
    """The address of the repository that ``_config.yml`` names, or an empty text.

    Raises:
        ValueError: if the address is not that of a repository on GitHub, the only host whose notebooks Colab opens by
            their address.
    """
    settings = yaml.safe_load(config.read_text(encoding="utf-8")).get("repository") or {}
    address = settings.get("url") or ""
    if address and not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+(?<!\.git)", str(address), re.ASCII):
        raise ValueError(f"repository: expected https://github.com/OWNER/NAME or empty, got {address!r}")
    return address


def first_cell(address: str) -> dict[str, Any]:
    """The code cell that makes the course importable in Colab, as a notebook's file holds it."""
    return {
        "cell_type": "code",
        "execution_count": 1,
        "id": CELL,
        "metadata": {"tags": ["remove-cell"]},
        "outputs": [],
        "source": SOURCE.format(address=address, branch=BRANCH).rstrip("\n").splitlines(keepends=True),
    }


def with_first_cell(notebook: str, address: str) -> str:
    """The text of a notebook's file with the first code cell for this address, or without it if there is none.

    The cell has no output, so the execution counts of the other cells move by one and nothing else changes.
    """
    content = json.loads(notebook)
    cells = [cell for cell in content["cells"] if cell.get("id") != CELL]
    moved = bool(address) - (len(content["cells"]) - len(cells))
    for cell in cells:
        for counted in (cell, *cell.get("outputs", [])):
            if counted.get("execution_count"):
                counted["execution_count"] += moved
    if address:
        first = next(place for place, cell in enumerate(cells) if cell["cell_type"] == "code")
        cells.insert(first, first_cell(address))
    content["cells"] = cells
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def turn_on(app: Sphinx, config: Config) -> None:
    """Turn on the links if there is an address: to edit each page, and to open each notebook in Colab."""
    if address := repository(Path(app.srcdir) / "_config.yml"):
        config.html_theme_options |= {
            "repository_url": address,
            "repository_branch": BRANCH,
            "use_edit_page_button": True,
            "launch_buttons": {"colab_url": COLAB},
        }


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", turn_on)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
    address = repository(ROOT / "_config.yml")
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    for path in chapters:
        path.write_text(with_first_cell(path.read_text(encoding="utf-8"), address), encoding="utf-8")
    print(f"{len(chapters)} notebooks install the course from {address or 'nowhere'}")


if __name__ == "__main__":
    main()
