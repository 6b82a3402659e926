"""Settings that must be made before torch is imported and before nbval starts its kernels, which inherit them."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per worker, so that results do not depend on the machine
os.environ.setdefault("NFLOWS_PROGRESS", "0")  # the rates in a progress bar differ in every run

# Scripts: looking for their doctests would run them and draw the pictures again.
collect_ignore = ["chapters/assets/cover.py", "chapters/assets/samples.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Let nbval's kernels find the slow packages imported."""
    if config.getoption("nbval", default=False):
        from forked_kernels import fork_kernels  # a module of tests/

        fork_kernels()
