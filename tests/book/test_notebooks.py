"""The committed chapters have the normal form, and the comparison that guards them fails when it must."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from forked_kernels import fork_kernels
from jupyter_client.provisioning import KernelProvisionerFactory
from nbformat import v4
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from notebooks import check, normalise, problems

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_in_order(path: Path) -> None:
    assert check(path) == []


# (source, stored output, whether the comparison should pass)
CASES = {
    "same text": ("print('✓ the bound holds')", "✓ the bound holds\n", True),
    "a changed tick": ("print('✗ the bound holds')", "✓ the bound holds\n", False),
    "a changed claim": ("print('✓ the bound holds')", "✓ the bound fails\n", False),
    "a changed count": ("print('parameters 1204')", "parameters 1203\n", False),
    "a changed constant": ("print('D log 4 = 88.72')", "D log 4 = 88.73\n", False),
    "a measured number": ("print('loss ≈ 88.8 nats')", "loss ≈ 91.25 nats\n", True),
    "a measured number with its spread": ("print('≈ 1.2 ± 0.1, kept')", "≈ -13 ± .25, kept\n", True),
    "thousands and powers": ("print('≈ 1,024.5 and ≈ 3e-07')", "≈ 980 and ≈ -1.5e+10\n", True),
    "what follows a measured number": ("print('≈ 88.8 nats')", "≈ 88.8 bits\n", False),
    "a second number without a sign": ("print('≈ 1.5 2.5')", "≈ 1.5 2.6\n", False),
    "nan is no number": ("print('≈ nan')", "≈ 88.8\n", False),
    "columns that shift": ("print('ReLU  ≈ 9.5  ≈ 10.25\\nLeaky ≈ 8.0')", "ReLU ≈  10.5 ≈ 9.25\nLeaky ≈ 11.0\n", True),
    "a line too few": ("print('a ≈ 1.0')", "a ≈ 1.0\nb ≈ 1.0\n", False),
    "no output any more": ("pass", "✓ the bound holds\n", False),
    "a new output": ("print('more')", "", False),
    "the kernel is this environment's": ("import sys\nprint(sys.executable)", f"{sys.executable}\n", True),
    "no progress bars": ("import os\nprint(os.environ['NFLOWS_PROGRESS'])", "0\n", True),
}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that starts pytest or make, without the variables of the surrounding pytest and make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE"))}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Whether each case passed, from one nbval run with the flags of ``make test``."""
    folder = tmp_path_factory.mktemp("nbval")
    cells = []
    for number, (source, stored, _) in enumerate(CASES.values(), start=1):
        outputs = [v4.new_output("stream", name="stdout", text=stored)] if stored else []
        cells.append(v4.new_code_cell(source, outputs=outputs, execution_count=number))
    # This kernel does not exist: the kernel that a notebook names must not matter.
    kernel = {"kernelspec": {"name": "someone-elses", "display_name": "", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), folder / "cases.ipynb")
    flags = re.search(r"^NBVAL := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert flags
    flags = flags[1].replace("tests/sanitize.cfg", str(ROOT / "tests" / "sanitize.cfg")).split()
    pytest_here = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir=."]
    done = run([*pytest_here, *flags, "cases.ipynb"], folder)
    found = re.findall(r"::Cell (\d+) (PASSED|FAILED)", done.stdout)
    assert len(found) == len(CASES), done.stdout
    return dict(zip(CASES, [outcome == "PASSED" for _, outcome in found], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_comparison(outcomes: dict[str, bool], case: str) -> None:
    assert outcomes[case] is CASES[case][2]


SURROUNDINGS = """
import os, sys
print(os.getcwd(), sys.executable, sys.path, sorted({*os.environ} - {"JPY_PARENT_PID"}), os.getsid(0) == os.getpid())
print([name for name in sys.modules if name.startswith("nflows_lib")], os.environ["MPLBACKEND"])
"""
PICTURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint('torch._dynamo' in sys.modules)"


def printed(folder: Path, *cells: str) -> list[dict]:
    """What a new kernel, started as nbval starts it, displays for these cells."""
    kernel, shown = RunningKernel(CURRENT_ENV_KERNEL_NAME, cwd=str(folder)), []
    try:
        for cell in cells:
            asked = kernel.execute_cell_input(cell)
            kernel.await_reply(asked, timeout=60)
            while (message := kernel.get_message("iopub", timeout=60))["content"].get("execution_state") != "idle":
                if message["parent_header"].get("msg_id") == asked:
                    shown += [message["content"]] if message["msg_type"] in ("stream", "display_data", "error") else []
    finally:
        kernel.stop()
    return shown


def test_a_forked_kernel_has_the_surroundings_of_a_kernel_of_its_own(tmp_path: Path, monkeypatch) -> None:
    factory = KernelProvisionerFactory.instance()
    monkeypatch.setattr(factory, "default_provisioner_name", "local-provisioner")
    (expected,) = printed(tmp_path, SURROUNDINGS)
    fork_kernels()
    surroundings, picture, loaded = printed(tmp_path, SURROUNDINGS, PICTURE)
    assert surroundings == expected
    assert "image/png" in picture["data"]
    assert loaded["text"] == "True\n"


@pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="make would set up .venv first")
def test_make_seeds_runs_the_tool_that_runs_each_seed(tmp_path: Path) -> None:
    """A program that prints its arguments and fails takes the place of Python."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $NFLOWS_PRESET $NFLOWS_PROGRESS $NFLOWS_DEVICE $*"\nexit 1\n')
    program.chmod(0o755)
    done = run(["make", "seeds", "SEEDS=2 3", "JOBS=4", f"BIN={tmp_path}", "CHAPTER=chapters/a.ipynb"], ROOT)
    assert "\n1 quick 0 cpu tests/seeds.py --jobs 4 --seeds 2 3 -- chapters/a.ipynb\n" in done.stdout, done.stderr
    assert done.returncode != 0


def sound_notebook() -> nbformat.NotebookNode:
    cell = v4.new_code_cell("print('✓')", outputs=[v4.new_output("stream", text="✓\n")], execution_count=1)
    return normalise(v4.new_notebook(cells=[cell]))


def test_normal_form_depends_on_no_machine() -> None:
    notebook = sound_notebook()
    clean = nbformat.writes(notebook)
    cell = notebook.cells[0]
    notebook.metadata.widgets = {"state": {}}
    notebook.metadata.kernelspec = {"name": "mine", "display_name": "Mine"}
    notebook.metadata.language_info = {"name": "python", "version": "3.11.7"}
    cell.metadata.execution = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    cell.outputs = [v4.new_output("stream", text="✓"), v4.new_output("stream", text="\n")]
    assert nbformat.writes(normalise(notebook)) == clean
    assert nbformat.writes(normalise(normalise(notebook))) == clean


def test_a_cell_without_id_gets_the_same_one_each_time() -> None:
    notebook = sound_notebook()
    del notebook.cells[0]["id"]
    assert normalise(notebook).cells[0].id == "cell-01" == normalise(notebook).cells[0].id


def test_a_traceback_keeps_only_name_and_message() -> None:
    notebook = sound_notebook()
    error = v4.new_output("error", ename="ValueError", evalue="expected 2", traceback=["File /home/me/x.py", "..."])
    notebook.cells[0].outputs = [error]
    assert normalise(notebook).cells[0].outputs[0].traceback == ["ValueError: expected 2"]


def stream(text: str):
    return [v4.new_output("stream", text=text)]


def picture(size: int):
    import base64

    data = {"image/png": base64.b64encode(bytes(size)).decode(), "text/plain": "<Figure>"}
    return [v4.new_output("display_data", data=data)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "x = 1\n" * 41}, "at most 40 lines, came 41"),
        ({"source": "%matplotlib inline"}, "expected plain Python"),
        ({"execution_count": None}, "expected every cell run once"),
        ({"execution_count": 7}, "expected every cell run once"),
        ({"outputs": stream("UserWarning: old\n")}, "expected no warning"),
        ({"outputs": stream("saved in /home/me/data/x.png\n")}, "no path of this machine in an output, came '/home/me"),
        ({"outputs": picture(1000)}, "expected alt text"),
        ({"outputs": picture(100_001)}, "expected a figure of at most 100000 bytes, came 100001"),
        ({"outputs": [v4.new_output("display_data", data={"text/html": "<b>"})]}, "came text/html"),
        ({"outputs": [v4.new_output("error", ename="E", evalue="bad", traceback=["E: bad"])]}, "came E: bad"),
        ({"metadata": nbformat.NotebookNode(tags=["raises-exception"])}, "expected an error"),
        ({"metadata": nbformat.NotebookNode(execution={})}, "not in the normal form"),
    ],
)
def test_what_is_out_of_order_is_named(change: dict, message: str) -> None:
    notebook = sound_notebook()
    notebook.cells[0].update(change)
    assert message in "\n".join(problems(notebook, size=1000))


@pytest.mark.parametrize("text", ["6.1 nats/dim, 1/2", "see https://arxiv.org/abs/1410.8516", "a / b", "and/or/not"])
def test_a_fraction_is_no_path(text: str) -> None:
    notebook = sound_notebook()
    notebook.cells[0].outputs = stream(text)
    assert problems(notebook, size=1000) == []


def test_a_sound_notebook_has_no_problem() -> None:
    assert problems(sound_notebook(), size=1000) == []
    assert "at most 1500000 bytes" in problems(sound_notebook(), size=1_500_001)[0]
