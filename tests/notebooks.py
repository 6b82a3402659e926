"""Execute chapters in place and bring them to one normal form: ``python tests/notebooks.py chapters/*.ipynb``.

The normal form holds nothing that depends on when or where a chapter ran, so a diff shows what changed. ``--check``
executes nothing and names what is not in the normal form; tests/book/test_notebooks.py makes the same check.
"""

import argparse
import base64
import copy
import io
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image

CELL_TIMEOUT = 600  # seconds; a chapter may take three minutes as a whole
MAX_CELL_LINES = 40
MAX_FIGURE_BYTES = 100_000
MAX_NOTEBOOK_BYTES = 1_500_000
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

# An absolute path with a folder in it, if the text before it does not make it a fraction or an address.
MACHINE_PATH = re.compile(r"(?<![\w/.:)\]}>~])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Z]:\\\w+")


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run every cell with the environment's own kernel, in ``folder``."""
    from nbclient import NotebookClient  # slow to import, and --check does not need it

    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=40"],  # errors only: ipykernel warns of every local connection
    ).execute()


def shrink_figures(notebook: NotebookNode) -> None:
    """Store each PNG with a palette of 256 colours if that is smaller, as it is for scatter plots, by two thirds."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            original = base64.b64decode(output.data["image/png"])
            smaller = io.BytesIO()
            Image.open(io.BytesIO(original)).convert("RGB").quantize(256, dither=0).save(smaller, "PNG", optimize=True)
            if smaller.tell() < len(original):
                output.data["image/png"] = base64.b64encode(smaller.getvalue()).decode() + "\n"


def normalise(notebook: NotebookNode) -> NotebookNode:
    """A copy of the notebook without timestamps, widget state, kernel details and tracebacks.

    Streams are merged, and every cell has an id. Tracebacks are removed because they name this machine's files; the
    page shows the error's name and message.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = NotebookNode(
        {key: value for key, value in notebook.metadata.items() if key not in ("widgets", "language_info")}
        | {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    taken = {cell.id for cell in notebook.cells if "id" in cell}
    for number, cell in enumerate(notebook.cells, start=1):
        if "id" not in cell:
            cell.id = next(name for name in _names(f"cell-{number:02d}") if name not in taken)
            taken.add(cell.id)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = NotebookNode()
                if output.output_type == "error":
                    output.traceback = [f"{output.ename}: {output.evalue}"]
    return notebook


def problems(notebook: NotebookNode, size: int) -> list[str]:
    """The reasons why ``notebook`` (``size`` bytes on disk) must not be committed, one per line."""
    found = []
    if notebook != normalise(notebook):
        found.append("not in the normal form: run `make notebooks`")
    if size > MAX_NOTEBOOK_BYTES:
        found.append(f"expected at most {MAX_NOTEBOOK_BYTES} bytes, came {size}")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"expected every cell run once and in order, came execution counts {counts}")
    for cell in code:
        found += [f"cell {cell.get('id', '?')}: {problem}" for problem in _cell_problems(cell)]
    return found


def _cell_problems(cell: NotebookNode) -> list[str]:
    found = []
    lines = cell.source.splitlines()
    if len(lines) > MAX_CELL_LINES:
        found.append(f"expected at most {MAX_CELL_LINES} lines, came {len(lines)}")
    if any(line.startswith(("%", "!")) for line in lines):
        found.append("expected plain Python (nflows_lib.notebook runs it too), came a line with % or !")
    may_raise = "raises-exception" in cell.metadata.get("tags", [])
    raised = [output for output in cell.outputs if output.output_type == "error"]
    if raised and not may_raise:
        found.append(f"expected no error (no tag raises-exception), came {raised[0].ename}: {raised[0].evalue}")
    if may_raise and not raised:
        found.append("expected an error (tag raises-exception), came none")
    for output in cell.outputs:
        text = text_of(output)
        if "warning" in text.lower():
            found.append(f"expected no warning in an output, came {text[:200]!r}")
        if path := MACHINE_PATH.search(text):
            found.append(f"expected no path of this machine in an output, came {path.group()!r}")
        data = output.get("data", {})
        if "image/png" in data:
            figure = len(base64.b64decode(data["image/png"]))
            if figure > MAX_FIGURE_BYTES:
                found.append(f"expected a figure of at most {MAX_FIGURE_BYTES} bytes, came {figure}")
            if len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) < 10:
                found.append("expected alt text for the figure in metadata.mystnb.image.alt, came none worth the name")
        for kind in data.keys() - {"text/plain", "image/png"}:
            found.append(f"expected text or a PNG figure, came {kind}")
    return found


def text_of(output: NotebookNode) -> str:
    """All text of an output."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join([output.evalue, *output.traceback])
    return "\n".join(value for kind, value in output.data.items() if kind.startswith("text/"))


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    merged: list[NotebookNode] = []
    for output in outputs:
        before = merged[-1] if merged else None
        if output.output_type == "stream" and before is not None and before.get("name") == output.name:
            before.text += output.text
        else:
            merged.append(output)
    return merged


def _names(base: str):
    yield base
    for number in range(2, 1000):
        yield f"{base}-{number}"


def write(notebook: NotebookNode, path: Path) -> None:
    path.write_text(nbformat.writes(notebook, indent=1, ensure_ascii=False).rstrip("\n") + "\n", encoding="utf-8")


def check(path: Path) -> list[str]:
    return problems(nbformat.read(path, as_version=4), path.stat().st_size)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="execute nothing; name what is not in the normal form")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.notebooks:
        if not options.check:
            notebook = nbformat.read(path, as_version=4)
            print(f"{path}: running", flush=True)
            execute(notebook, path.parent)
            shrink_figures(notebook)
            write(normalise(notebook), path)
        found = check(path)
        print(f"{path}: " + ("; ".join(found) if found else "in order"))
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
