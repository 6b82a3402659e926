"""torch.compile in named runs: which runs are compiled, and a first step that shows whether compiling works."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nflows_lib.distributions import random_state_kept
from nflows_lib.experiments import processes


def is_worth_it(seconds: float | None, flow: nn.Module, device: torch.device) -> bool:
    """Whether a run is so long that faster steps make up for the time to compile: longer than ten minutes.

    On a CPU the run must also take more than two seconds per parameter tensor of the flow, since there PyTorch compiles
    for about 0.4 seconds per tensor, and a compiled run saves the time of one step in five or six.

    Args:
        seconds: the time that the run may take; None if the run has a number of steps, whose time is unknown.
        flow: the flow that is trained.
        device: the device on which the run trains.
    """
    tensors = len(list(flow.parameters())) if device.type == "cpu" else 0
    return seconds is not None and seconds > max(600, 2 * tensors)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler that it needs for a device.

    A GPU with CUDA needs Triton and compute capability 7.0. A CPU needs the C++ compiler that ``CXX`` names, by default
    g++ (on a Mac clang++, on Windows cl). Compiling for other devices is untried, so the answer for them is False.
    """
    if device.type == "cuda":
        return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    if device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return shutil.which(os.environ.get("CXX", usual)) is not None
    return False


def choose(wish: bool | None, kept: bool | None, worth_it: bool, device: torch.device) -> bool:
    """Whether to compile a run.

    Args:
        wish: what the caller asks for; None leaves the choice to this function.
        kept: for a resumed run, whether its last part was compiled: the run does the same again, unless there is no
            compiler now. None for a new run, which is compiled if that is worth it and there is a compiler.
        worth_it: what :func:`is_worth_it` says of the run.
        device: the device on which the run trains.

    Raises:
        ValueError: if wish is True under torchrun or on mps, where compiling is untried.
    """
    untried = "under torchrun" if processes.torchrun() else "on mps" if device.type == "mps" else None
    if wish and untried:
        raise ValueError(f"compiled: expected False {untried}, where it is untried, got True")
    if wish is not None:
        return wish
    possible = untried is None and has_compiler(device)
    if kept and not possible:
        why = f"compiling is untried {untried}" if untried else "there is no compiler"
        tqdm.write(f"The run was compiled before. It goes on without torch.compile: {why}.")
    return possible and (worth_it if kept is None else kept)


def compile_flow(flow: nn.Module, batch: Tensor, context: Tensor | None) -> nn.Module:
    """The flow as one graph, compiled by a step on this batch; if that step fails, the flow itself and a printed line.

    The graph computes with the flow's own parameters. Parameters, buffers and the random state stay as they were.
    """
    graph, state = torch.compile(flow), copy.deepcopy(flow.state_dict())
    try:
        with random_state_kept(batch.device):
            graph(batch, context, validate=False).mean().backward()
    except Exception as error:  # a missing or failing compiler may raise anything
        cause = getattr(error, "inner_exception", error)  # PyTorch wraps what a compiler raises
        reason = next(iter(str(cause).splitlines()), "")
        tqdm.write(f"torch.compile failed, so the run goes on without it: {type(cause).__name__}: {reason}")
        graph = flow
    flow.load_state_dict(state)
    flow.zero_grad()
    return graph
