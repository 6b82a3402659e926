"""The environment's three files agree, and nothing in the repository is tied to one machine."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import chromium
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import conftest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):(?!.*export)", MAKEFILE, re.MULTILINE)
PYTHONS = ["3.11", "3.12", "3.13"]
# The names are written in pieces, so that the search does not find this file.
HOSTS = [".".join(pieces) for pieces in [("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "")]]
MACHINE_PATHS = ["/" + name + "/" for name in ("root", "work", "tmp", "home", "Users")]
MAX_FILE_BYTES = 16 * 2**20


def requirements() -> list[Requirement]:
    """All requirements except the benchmark's, which have their own lock (tests/test_benchmarks.py)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "bench"]
    return [Requirement(line) for line in [*project["dependencies"], *(line for extra in extras for line in extra)]]


def lock(python: str, platform: str = "linux") -> dict[str, str]:
    """The versions that requirements.lock installs under this Python, by package."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform}
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line[:1].isalnum():
            pin = Requirement(line.rstrip(" \\"))
            if pin.marker is None or pin.marker.evaluate(environment):
                name = canonicalize_name(pin.name)
                assert name not in pins, f"{name} is pinned twice for Python {python}"
                assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"expected one version of {name}, came {line}"
                pins[name] = str(pin.specifier).removeprefix("==")
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_what_the_project_asks_for(python: str) -> None:
    pins = lock(python)
    for requirement in requirements():
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock for Python {python}"
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_the_lock_has_what_builds_the_package(platform: str) -> None:
    """The package is built without isolation, by the setuptools in the lock."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    for requirement in map(Requirement, build["requires"]):
        assert requirement.specifier.contains(lock("3.11", platform)[requirement.name])


def test_the_lock_has_hashes_and_no_addresses() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-zA-Z0-9])", text)
    assert not [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry]
    assert "://" not in text and " @ " not in text and "--index" not in text


def test_conda_agrees_with_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.13", "pip"]
    *pins, package = pip["pip"]
    assert package == "-e ."
    locked = lock("3.13")
    expected = {f"{r.name}=={locked[canonicalize_name(r.name)]}" for r in requirements()}
    assert set(pins) == expected
    assert len(pins) == len(expected)


def test_the_supported_pythons_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "python3.13 python3.12 python3.11 python3" in (ROOT / "tools" / "environment.sh").read_text("utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]


def find_python(tmp_path: Path, *candidates: str) -> subprocess.CompletedProcess[str]:
    """What tools/environment.sh chooses if this interpreter pretends to be other versions."""
    for name in candidates:
        if name != "missing":
            guise = f"import sys; sys.version_info = ({name[1:].replace('.', ', ')}, 0); exec(sys.stdin.read())"
            (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} -c "{guise}" uv\n')
            (tmp_path / name).chmod(0o755)
    functions = re.findall(
        r"^\w+\(\) \{.*?\}$", (ROOT / "tools/environment.sh").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    script = "\n".join(["set -euo pipefail", *functions[:3], "find_python"])
    names = " ".join(str(tmp_path / name) for name in candidates)
    return subprocess.run(["bash", "-c", script], env=os.environ | {"PYTHON": names}, capture_output=True, text=True)


def test_the_first_python_that_can_be_used_is_found(tmp_path: Path) -> None:
    for version in PYTHONS:
        ran = find_python(tmp_path, "missing", "p3.10", f"p{version}", "p3.12")
        assert ran.stdout == f"{tmp_path / f'p{version}'}\n", ran.stderr
    ran = find_python(tmp_path, "p3.10", "p3.14", "missing")
    assert (ran.returncode, ran.stdout) == (1, "")
    told = [line.split(": ")[1] for line in ran.stderr.splitlines()[1:4]]
    assert told == ["3.10, too old or too new", "3.14, too old or too new", "not found, or does not run"]


def test_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = [line.split()[1] for line in shown.splitlines()]
    assert listed == TARGETS
    assert {"book", "test", "seeds", "notebooks", "lab", "lock", "clean"} <= set(TARGETS)
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony and phony[1].split() == TARGETS


def test_ci_runs_what_a_reader_runs() -> None:
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = {command.split()[1] for command in commands if command.startswith("make ")}
    assert called == {"test", "pdf"} and len(called) == len(commands)


def test_the_citation_file_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["title"] == yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["title"]


def test_no_file_is_tied_to_a_machine_or_a_registry(tracked_texts: dict[Path, str]) -> None:
    found = []
    for path, text in tracked_texts.items():
        # A path begins a word, so `figures/work/` is not a path of this machine.
        found += [(path.name, host) for host in HOSTS if host in text]
        found += [(path.name, start) for start in MACHINE_PATHS if re.search(rf"(?<![\w.*~-]){start}", text)]
    # Two tests contain machine paths on purpose, to test that they are refused.
    assert [entry for entry in found if entry[0] != "test_notebooks.py"] == []


def test_no_file_is_too_large_for_git(tracked_files: list[Path]) -> None:
    sizes = {path.name: path.stat().st_size for path in tracked_files}
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES}


def test_a_missing_browser_does_not_go_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name is an error before the first test; without a browser the summary counts the skipped tests."""
    monkeypatch.setenv("CHROMIUM", "kromium")
    with pytest.raises(pytest.UsageError, match="CHROMIUM is 'kromium', which is no program"):
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(numprocesses=2)))
    monkeypatch.setenv("CHROMIUM", sys.executable)
    assert chromium.find() == sys.executable
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setenv("PATH", "")
    assert chromium.find() is None
    lines: list[str] = []
    skipped = [SimpleNamespace(longrepr=("conftest.py", 1, f"Skipped: {why}")) for why in (chromium.MISSING, "no git")]
    reporter = SimpleNamespace(stats={"skipped": skipped}, write_line=lambda line, **_: lines.append(line))
    conftest.pytest_terminal_summary(reporter)
    assert lines == [f"Skipped browser tests: 1, because there is {chromium.MISSING}"]
