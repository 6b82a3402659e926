"""Kernels that are forked from a process which has imported the slow packages already.

A new kernel needs longer to import these packages than most chapters need for their work, so nbval's kernels are
forked. A forked kernel has the folder, the environment variables and the search path of a kernel of its own; only
packages are loaded beforehand, and nothing of this project. ``make notebooks`` and ``make seeds`` start every kernel
from nothing.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint
from multiprocessing.context import ForkServerProcess
from typing import Any

import forked
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

LAUNCHER = "ipykernel_launcher"  # the module that a kernel's command runs


def become_kernel(arguments: list[str], folder: str, environment: dict[str, str], path: list[str]) -> None:
    """Turn this process into a kernel, as ``python -m ipykernel_launcher`` with these arguments does."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | {"JPY_PARENT_PID": str(os.getppid())})  # the kernel ends when its parent ends
    sys.path[:] = path

    import matplotlib
    from ipykernel import kernelapp

    # ipykernel sets this variable too late for a Matplotlib that is imported already.
    matplotlib.rcParams["backend"] = os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    kernelapp.launch_new_instance(argv=arguments)


class Forked:
    """A forked process with the methods of a ``subprocess.Popen`` that Jupyter calls."""

    stdin = stdout = stderr = None

    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.process.pid, signum)


class ForkedKernel(LocalProvisioner):
    """Starts a kernel as a forked process."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        environment = options["env"]
        arguments = cmd[cmd.index(LAUNCHER) + 1 :]
        folder = str(options.get("cwd") or os.getcwd())
        given = (arguments, folder, environment, forked.search_path(environment))
        process = forked.context().Process(target=become_kernel, args=given, daemon=True)
        process.start()
        self.process, self.pid, self.pgid = Forked(process), process.pid, process.pid
        return self.connection_info


def fork_kernels() -> None:
    """Let Jupyter, in this process, fork every kernel that it starts."""
    factory = KernelProvisionerFactory.instance()
    group = KernelProvisionerFactory.GROUP_NAME
    factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:{ForkedKernel.__name__}", group)
    factory.default_provisioner_name = "forked"
