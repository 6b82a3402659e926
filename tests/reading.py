"""Measure how long a chapter is to read: ``python tests/reading.py chapters/0*.ipynb``.

The script counts everything before the exercises, dropdowns included. A formula or a reference within a sentence is one
word; displayed equations, code blocks and table rules count no words. A figure's caption belongs to the time for the
figure. Folded cells have no visible lines, and blank lines of code do not count.
"""

import ast
import re
import sys
from collections import defaultdict
from dataclasses import dataclass

import nbformat
from nbformat import NotebookNode
from notebooks import text_of

WORDS_PER_MINUTE, SECONDS_PER_LINE, SECONDS_PER_FIGURE = 150, 4, 30
MAX_WORDS, MAX_LINES, MAX_SECTION_WORDS = 2_500, 450, 350
FOLDED = {"hide-input", "remove-input", "remove-cell"}

NOT_PROSE = [
    re.compile(r"^\$\$.*?^\$\$.*?$", re.DOTALL | re.MULTILINE),  # displayed equations with their labels
    re.compile(r"^```(?:sh|python|text)\n.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"^(?:```.*|:[\w-]+:.*|\([\w-]+\)=|[|: -]+)$", re.MULTILINE),  # fences, options, labels, table rules
    re.compile(r"<[^>]*>"),
]
ONE_WORD = re.compile(r"\$[^$]+\$|\{[\w:]+\}`[^`]*`|`[^`]+`")
WORD = re.compile(r"[^\W_](?:[\w'’.,-]*\w)?")


@dataclass
class Length:
    """How much a chapter gives its reader before the exercises."""

    words: int
    lines: int
    figures: int
    sections: dict[str, int]  # words by heading

    @property
    def minutes(self) -> int:
        """The reading time in minutes, to the nearest five."""
        seconds = self.words / WORDS_PER_MINUTE * 60 + self.lines * SECONDS_PER_LINE + self.figures * SECONDS_PER_FIGURE
        return 5 * round(seconds / 300)


def parts(path: str, content: str) -> dict[str, str]:
    """A page's source by kind: text (with the captions and alt texts of a notebook), code, outputs."""
    if not path.endswith(".ipynb"):
        return {"text": content}
    said = {"text": [], "code": [], "outputs": []}
    for cell in nbformat.reads(content, as_version=4).cells:
        said["code" if cell.cell_type == "code" else "text"].append(cell.source)
        shown = cell.metadata.get("mystnb", {})
        said["text"] += [shown.get("figure", {}).get("caption", ""), shown.get("image", {}).get("alt", "")]
        outputs = cell.get("outputs", [])
        said["outputs"] += [text_of(output) for output in outputs if "image/png" not in output.get("data", {})]
    return {kind: "\n".join(pieces) for kind, pieces in said.items()}


def words(text: str) -> int:
    for pattern in NOT_PROSE:
        text = pattern.sub(" ", text)
    return len(WORD.findall(ONE_WORD.sub(" word ", text)))


def length(notebook: NotebookNode) -> Length:
    lines = figures = 0
    heading, sections = "", defaultdict(int)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if not FOLDED & set(cell.metadata.get("tags", [])):
                lines += sum(bool(line.strip()) for line in cell.source.splitlines())
            figures += "figure" in cell.metadata.get("mystnb", {})
            continue
        before, *rest = re.split(r"^## Exercises$", cell.source, flags=re.MULTILINE)
        for part in re.split(r"^(?=##? )", before, flags=re.MULTILINE):
            if part.startswith("#"):
                heading = part.splitlines()[0].strip("# ")
            sections[heading] += words(part)
        if rest:
            break
    sections = {name: count for name, count in sections.items() if count}
    return Length(sum(sections.values()), lines, figures, sections)


def bound_again(notebook: NotebookNode) -> dict[str, list[int]]:
    """The names that several cells bind, with the places of these cells, without names that only folded cells bind."""
    places, shown = defaultdict(list), set()
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        names = {name for statement in ast.parse(cell.source).body for name in _bound(statement)} - {"_"}
        for name in names:
            places[name].append(place)
        if not FOLDED & set(cell.metadata.get("tags", [])):
            shown |= names
    return {name: cells for name, cells in places.items() if len(cells) > 1 and name in shown}


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement at a cell's top level binds, except the variables of loops."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    inner = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt | ast.excepthandler)]
    inner += [child for handler in inner if isinstance(handler, ast.excepthandler) for child in handler.body]
    return {name for child in inner if isinstance(child, ast.stmt) for name in _bound(child)}


def main(paths: list[str]) -> None:
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        found = length(notebook)
        print(f"{path}: {found.words} words, {found.lines} lines, {found.figures} figures, {found.minutes} minutes")
        for heading, count in found.sections.items():
            if count > MAX_SECTION_WORDS:
                print(f"    {count} words in '{heading}'")
        for name, cells in bound_again(notebook).items():
            print(f"    {name} is bound in the cells {cells}")


if __name__ == "__main__":
    main(sys.argv[1:])
