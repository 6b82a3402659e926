"""Tests of the house's plan: imports, declared dependencies, the library's size, and the content of a built wheel."""

from __future__ import annotations

import ast
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import forked
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
ENTRIES = {"__init__", "__main__", "ablations", "notebook"}  # entry modules of a few lines
SOURCES = sorted((ROOT / "nflows_lib").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # packages whose name differs from their module's


def lines_of_code(path: Path) -> int:
    """The number of lines that hold code, without docstrings, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_the_library_can_be_read_in_an_evening():
    counted = {path.stem: lines_of_code(path) for path in (ROOT / "nflows_lib").glob("*.py")}
    library = {name: lines for name, lines in counted.items() if name not in ENTRIES}
    print(sorted(library.items(), key=lambda item: -item[1]))
    assert sum(library.values()) <= 1600
    assert all(counted[name] <= 10 for name in ENTRIES)


# Imports that the plan forbids: the module, the line that is added to it, and the module that it then imports.
FORBIDDEN = [
    ("flow", "from nflows_lib.experiments import archive", "experiments.archive"),
    ("flow", "from nflows_lib.clinic import doctor", "clinic"),
    ("coupling", "from nflows_lib.training import fit", "training"),
    ("normalization", "from nflows_lib import data", "data"),
    ("multiscale", "from nflows_lib import plotting", "plotting"),
    ("clinic/report", "from nflows_lib.experiments import archive", "experiments.archive"),
    ("experiments/table", "from nflows_lib.experiments import runs", "experiments.runs"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder with a copy of the package and of the files from which its wheel is built."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "nflows_lib", folder / "nflows_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-text.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def broken(copy, tmp_path_factory) -> str:
    """The report of lint-imports on a copy with every forbidden import, and with a module that is in no layer."""
    folder = tmp_path_factory.mktemp("broken") / "house"
    shutil.copytree(copy, folder)
    for module, line, _ in FORBIDDEN:
        with open(folder / "nflows_lib" / f"{module}.py", "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    (folder / "nflows_lib" / "new_room.py").write_text("x = 1\n", encoding="utf-8")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("module", "line", "target"), FORBIDDEN)
def test_an_import_against_the_plan_is_noticed(broken, module, line, target):
    dotted = module.replace("/", ".")
    assert re.search(rf"^-\s+nflows_lib\.{dotted} -> nflows_lib\.{target} \(l\.\d+\)$", broken, re.MULTILINE), broken


def test_a_module_without_a_place_in_the_plan_is_noticed(broken):
    assert "not listed as layers:\n\n- nflows_lib.new_room\n" in broken


def test_a_wheel_holds_every_module_and_none_starts_another_program_when_it_is_imported(copy, tmp_path):
    """Each module is imported from the wheel. None needs git, since a run asks for the commit when it starts.

    An audit hook sees every program that is started.
    """
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = copy.glob("*.whl")
    modules = [module.name for module in pkgutil.walk_packages([str(ROOT / "nflows_lib")], "nflows_lib.")]
    assert {"nflows_lib.clinic.report", "nflows_lib.experiments.archive"} <= {*modules}
    script = (
        "import importlib, sys\n"
        "import torch, matplotlib.pyplot, sklearn.datasets\n"  # programs that other packages start do not count
        "assert not [name for name in sys.modules if name.startswith('nflows_lib')]\n"
        "started = []\n"
        "events = {'subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.exec', 'os.fork'}\n"
        "sys.addaudithook(lambda event, args: event in events and started.append((event, args[:1])))\n"
        f"found = [importlib.import_module(name).__file__ for name in {modules}]\n"
        "from nflows_lib import doctor\n"
        "assert not started, started\n"
        "print(*found, sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(wheel), "PATH": str(tmp_path)}
    said = tmp_path / "said"
    given = (script, environment, forked.search_path(environment), said)
    process = forked.context().Process(target=forked.run_code, args=given, daemon=True)
    process.start()
    process.join(300)
    printed = said.read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    assert all(file.startswith(str(wheel)) for file in printed.splitlines()), printed
    assert len(printed.splitlines()) == len(modules)


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports at any place, without imports within the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found - {"nflows_lib"}


def test_the_library_declares_what_it_imports_and_nothing_else():
    """torchvision belongs to the extra `data`, since only downloads need it."""
    modules = set().union(*map(imported, SOURCES)) - sys.stdlib_module_names
    needed = {DISTRIBUTIONS.get(module, module) for module in modules}
    declared = {Requirement(line).name for line in PROJECT["dependencies"]}
    extra = {Requirement(line).name for line in PROJECT["optional-dependencies"]["data"]}
    assert needed == declared | extra
    assert not declared & extra


def test_the_readme_names_what_a_machine_needs():
    """It names all declared packages, for a machine whose packages someone else has installed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sentence = re.search(r"It needs ([^:]+?), not Jupyter", text)[1]
    named = set(re.split(r",\s+|\s+and\s+", sentence))
    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["data"]]
    assert {name.lower() for name in named} == {Requirement(line).name for line in declared}
