"""Measure the models of :mod:`benchmarks.models` in every library that is installed: ``make bench``.

The program writes a JSON file and prints a table; ``python -m benchmarks.run --help`` lists the options.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.models import MODELS, OURS, Built, Model
from nflows_lib.experiments import archive
from nflows_lib.experiments.memory import peak_memory
from nflows_lib.experiments.precision import multiplies_bfloat16
from nflows_lib.flow import Flow
from nflows_lib.training import keep_freed_memory

HERE = Path(__file__).resolve().parent
STEP, LOG_PROB, SAMPLE = MEASURES = ("training step", "log-prob", "sampling")
NETWORKS, BFLOAT16, COMPILED = "its networks alone", "bfloat16 networks", "torch.compile"
WARM_UP = 3
BARS = (
    # name, the model whose training step is divided, what divides it, largest ratio allowed, goal
    ("Glow, training step / the faster peer's", "glow", "peers", 0.85, 0.8),
    ("Glow, training step / its networks alone", "glow", NETWORKS, 1.15, None),
    ("RealNVP, training step / the faster peer's", "realnvp", "peers", 1.0, None),
    ("NICE, training step / the faster peer's", "nice", "peers", 1.0, None),
)

Task = Callable[[], object]


# --- measuring --------------------------------------------------------------------------------------------------------


def alternate(tasks: dict[str, Task], rounds: int, seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of each task in each round; a round runs every task in turn, for about ``seconds`` each."""
    repeats = {}
    for name, task in tasks.items():
        for _ in range(WARM_UP):
            task()
        repeats[name] = max(1, round(seconds / _time(task, 1, device)))
    found: dict[str, list[float]] = {name: [] for name in tasks}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, task in tasks.items():
                found[name].append(1e3 * _time(task, repeats[name], device))
    finally:
        gc.enable()
    return found


def _time(task: Task, repeats: int, device: str) -> float:
    """The mean time of one call, in seconds."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        task()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- what is measured -------------------------------------------------------------------------------------------------


def training_step(parameters: Iterator[nn.Parameter], loss: Callable[[], Tensor]) -> Task:
    """A training step: forward, backward, fused Adam; the gradients are freed at its end, for :func:`peak_memory`."""
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def networks_step(flow: Flow, x: Tensor) -> Task:
    """A training step of the couplings' networks alone, on the inputs that they get in the flow, in the same layout."""
    networks, inputs = models.networks(flow), []
    hooks = [network.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for network in networks]
    flow.log_prob(x)
    for hook in hooks:
        hook.remove()
    # In the flow the gradient goes on to the layers before a network, if they have parameters.
    inputs = [h.detach().requires_grad_(h.requires_grad) for h in inputs]

    def loss() -> Tensor:
        for h in inputs:
            h.grad = None
        return sum(network(h).sum() for network, h in zip(networks, inputs, strict=True))

    return training_step((parameter for network in networks for parameter in network.parameters()), loss)


def without_gradient(task: Task) -> Task:
    return torch.no_grad()(task)


class _Alarm(BaseException):
    """An alarm that is not an Exception, since a compiler catches exceptions and goes on."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A context that raises a TimeoutError if its block runs longer than this."""
    import signal  # setitimer is not on Windows

    def stop(*_: object) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # it repeats, since a callback may ignore it once
    try:
        yield
    except _Alarm:
        raise TimeoutError(f"took more than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_step(flow: Flow, x: Tensor, seconds: float) -> tuple[Task | None, str]:
    """A training step of the compiled flow, or None if compiling failed or took too long; and how compiling went."""
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = torch.compile(flow)
    step = training_step(flow.parameters(), lambda: -compiled(x).mean())
    began = time.perf_counter()
    try:
        with at_most(seconds):
            step()
            step()
    except Exception as error:  # a missing or failing compiler may raise anything
        return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    breaks = sum(counters["graph_break"].values())
    return step, f"compiled in {time.perf_counter() - began:.0f} s, graph breaks of {breaks} kinds"


def measure(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """All measures of one model, as the file holds them."""
    torch.manual_seed(0)
    device = options.device
    flow = model.ours().module.to(device)
    x = torch.rand(model.batch, *flow.shape, device=device) - 0.5  # like dequantized images; the models draw no noise
    with torch.no_grad():
        for parameter in flow.parameters():  # without zeros, no two results are equal by chance
            parameter.add_(0.02 * torch.randn_like(parameter))
    flow.initialize(x)
    built: dict[str, Built] = {library: model.make(flow, library) for library in model.libraries()}
    batches = {}
    for library, one in built.items():
        one.module.to(device)
        models.check(model, flow, one, x)
        batches[library] = x if one.order is None else x[:, one.order].contiguous()

    tasks: dict[str, dict[str, Task]] = {measure: {} for measure in MEASURES}
    for library, one in built.items():

        def loss(one: Built = one, batch: Tensor = batches[library]) -> Tensor:
            return -one.log_prob(batch).mean()

        def sample(one: Built = one) -> Any:
            return one.sample(model.batch)

        tasks[STEP][library] = training_step(one.module.parameters(), loss)
        tasks[LOG_PROB][library] = without_gradient(loss)
        tasks[SAMPLE][library] = without_gradient(sample)
    ours, notes = f"{OURS}, ", {}
    tasks[STEP][ours + NETWORKS] = networks_step(model.make(flow, OURS).module, x)
    if "shape" in model.sizes and multiplies_bfloat16(torch.device(device)):  # of images
        half = model.ours(precision=torch.bfloat16).module.to(device)
        half.load_state_dict(flow.state_dict())
        tasks[STEP][ours + BFLOAT16] = training_step(half.parameters(), lambda: -half.log_prob(x).mean())
    if options.compile:
        step, notes[COMPILED] = compiled_step(model.make(flow, OURS).module, x, options.compile_seconds)
        if step is not None:
            tasks[STEP][ours + COMPILED] = step

    result: dict[str, Any] = {
        "title": model.title,
        "batch": model.batch,
        "parameters": {library: one.parameters for library, one in built.items()},
        "extra_parameters": {library: one.extra for library, one in built.items()},
        "notes": notes,
        "milliseconds": {},
    }
    for name in (LOG_PROB, SAMPLE, STEP):  # the training step changes the parameters, so it comes last
        for one in built.values():
            one.module.train(name == STEP)
        found = alternate(tasks[name], options.rounds, options.seconds, device)
        result["milliseconds"][name] = {task: summary(times, found[OURS]) for task, times in found.items()}
    result["mebibytes"] = {task: round(peak_memory(step, device) / 2**20, 2) for task, step in tasks[STEP].items()}
    for library, one in built.items():
        assert one.log_prob(batches[library]).isfinite().all(), f"{library} diverged while it was timed"
    return result


def summary(times: list[float], ours: list[float]) -> dict[str, Any]:
    """The file's entry for the rounds of one task; ``ratio`` is its median divided by ours."""
    rounded, ours = _rounded(times), _rounded(ours)
    median = statistics.median(rounded)
    return {
        "median": median,
        "least": min(rounded),
        "most": max(rounded),
        "ratio": round(median / statistics.median(ours), 3),
        "rounds": rounded,
    }


def _rounded(times: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in times]


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar, the measured ratio, and whether the bar is met; the ratio is None if it was not measured."""
    found = []
    for name, model, divisor, limit, goal in BARS:
        steps = results.get(model, {}).get("milliseconds", {}).get(STEP, {})
        others = {
            task: entry["median"]
            for task, entry in steps.items()
            if (not task.startswith(OURS) if divisor == "peers" else task == f"{OURS}, {divisor}")
        }
        bar: dict[str, Any] = {"name": name, "model": model, "limit": limit, "goal": goal, "ratio": None, "met": None}
        if others:
            fastest = min(others, key=lambda task: others[task])
            ratio = steps[OURS]["median"] / others[fastest]
            bar |= {"to": fastest, "ratio": round(ratio, 3), "met": ratio <= limit}
        found.append(bar)
    return found


# --- reporting --------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The CPU's name as Linux gives it, else "unknown"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table(content: dict[str, Any]) -> str:
    """The file's content as a table."""
    lines = [f"{content['processor']}, {content['threads']} threads, {content['hardware']}, torch {content['torch']}"]
    for result in content["models"].values():
        lines += ["", f"{result['title']}, batch {result['batch']}"]
        lines += [f"  {name}: {note}" for name, note in result["notes"].items()]
        for measure, entries in result["milliseconds"].items():
            lines.append(f"  {measure:34} {'ms':>9} {'least':>9} {'most':>9} {'to ours':>8} {'MiB':>7}")
            for task, entry in entries.items():
                mebibytes = f"{result['mebibytes'][task]:7.1f}" if measure == STEP else ""
                numbers = "".join(f" {entry[key]:9.3f}" for key in ("median", "least", "most"))
                lines.append(f"    {task:32}{numbers} {entry['ratio']:8.2f} {mebibytes}".rstrip())
    lines.append("")
    for bar in content["bars"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        measured = "" if bar["ratio"] is None else f" {bar['ratio']:.3f} ({bar['to']})"
        goal = "" if bar["goal"] is None else f", goal {bar['goal']}"
        lines.append(f"{bar['name']}: at most {bar['limit']}{goal}; measured{measured}: {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    text = "Time the models in every installed library, write a JSON file and print a table."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=text)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="the models to measure (default: all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the device (default: cpu)")
    parser.add_argument(
        "--threads", type=int, metavar="N", default=os.cpu_count(), help="PyTorch's threads (default: the cores)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", default=9, help="the number of rounds (default: 9)")
    parser.add_argument("--seconds", type=float, default=0.5, help="the time of one measurement (default: 0.5)")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--compile-seconds", type=float, default=180, help="the limit for compiling (default: 180)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/DEVICE.json)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="torch.triangular_solve is deprecated")  # nflows calls it
    keep_freed_memory()  # else the library that first frees a large block would change the timings of the others
    began = time.monotonic()
    results = {}
    for name in options.models:
        print(f"{MODELS[name].title} ...", file=sys.stderr, flush=True)
        results[name] = measure(MODELS[name], options)
    content = {
        **archive.origin(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": options.device,
        "versions": {library: version(library) for library in ("normflows", "nflows") if _measured(library, results)},
        "rounds": options.rounds,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "models": results,
        "bars": bars(results),
    }
    archive.write_json(options.out or HERE / f"{options.device}.json", content)
    print(table(content))


def _measured(library: str, results: dict[str, Any]) -> bool:
    return any(library in result["parameters"] for result in results.values())


if __name__ == "__main__":
    main()
