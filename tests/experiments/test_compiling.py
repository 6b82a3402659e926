"""Tests of torch.compile in named runs: by default, runs above ten minutes are compiled if there is a compiler."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys

import pytest
import torch
from torch import Tensor, nn

from nflows_lib.__main__ import main
from nflows_lib.experiments import compiling, processes, runs, table, trainer

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
NAME = "nice-digits"
HOUR = 3600.0


@pytest.fixture
def compiler(monkeypatch) -> None:
    """A fixture that pretends that CPU and CUDA have a compiler."""
    monkeypatch.setattr(compiling, "has_compiler", lambda device: device.type != "mps")


# --- machines with a compiler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "named", "expected"),
    [
        ("linux", None, "g++"),
        ("darwin", None, "clang++"),
        ("win32", None, "cl"),
        ("linux", "/opt/bin/clang++-18", "/opt/bin/clang++-18"),
    ],
)
def test_a_cpu_needs_the_compiler_that_pytorch_would_call(monkeypatch, platform, named, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    for found in ({expected}, {"g++", "clang++", "cl"} - {expected}):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: name if name in found else None)
        assert compiling.has_compiler(CPU) is (expected in found)


@pytest.mark.parametrize(
    ("triton", "capability", "expected"),
    [(True, (7, 0), True), (True, (9, 0), True), (True, (6, 1), False), (False, (9, 0), False)],
)
def test_a_gpu_needs_triton_and_compute_capability_7(monkeypatch, triton, capability, expected):
    spec = importlib.machinery.ModuleSpec("triton", None) if triton else None
    monkeypatch.setattr(compiling, "find_spec", {"triton": spec}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compiling.has_compiler(CUDA) is expected


def test_on_other_devices_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert not compiling.has_compiler(MPS)
    assert not compiling.has_compiler(torch.device("xpu"))


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "expected"), [(None, False), (30, False), (600, False), (601, True), (HOUR, True)])
def test_a_run_is_worth_compiling_if_it_is_longer_than_ten_minutes(seconds, expected):
    for device in (CPU, CUDA):
        assert compiling.is_worth_it(seconds, nn.Linear(2, 2), device) is expected


def test_on_a_cpu_a_flow_of_many_layers_must_train_longer():
    """The limit is two seconds for each of its 400 parameter tensors; on other devices nothing has been measured."""
    flow = nn.Sequential(*(nn.Linear(1, 1) for _ in range(200)))
    for device, expected in ((CPU, False), (CUDA, True)):
        assert compiling.is_worth_it(800, flow, device) is expected
        assert compiling.is_worth_it(801, flow, device)


@pytest.mark.parametrize("worth_it", [True, False])
def test_a_new_run_is_compiled_if_it_is_worth_it(compiler, worth_it):
    for device in (CPU, CUDA):
        assert compiling.choose(None, None, worth_it, device) is worth_it
    assert compiling.choose(None, None, worth_it, MPS) is False


@pytest.mark.parametrize("worth_it", [True, False])
@pytest.mark.parametrize("kept", [None, True, False])
@pytest.mark.parametrize("wish", [True, False])
def test_a_wish_is_followed(compiler, monkeypatch, wish, kept, worth_it, capsys):
    """The wish decides with a compiler and without one; without one the first step fails."""
    assert compiling.choose(wish, kept, worth_it, CPU) is wish
    monkeypatch.setattr(compiling, "has_compiler", lambda device: False)
    assert compiling.choose(wish, kept, worth_it, CPU) is wish
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("worth_it", [True, False])
def test_a_resumed_run_keeps_its_choice(compiler, kept, worth_it, capsys):
    assert compiling.choose(None, kept, worth_it, CPU) is kept
    assert capsys.readouterr().out == ""


def test_without_a_compiler_a_run_that_was_compiled_says_why_it_no_longer_is(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "has_compiler", lambda device: False)
    for kept in (None, False):
        assert compiling.choose(None, kept, True, CPU) is False
    assert capsys.readouterr().out == ""
    assert compiling.choose(None, True, True, CPU) is False
    assert capsys.readouterr().out == (
        "The run was compiled before. It goes on without torch.compile: there is no compiler.\n"
    )


@pytest.mark.parametrize(("device", "where"), [(CPU, "under torchrun"), (MPS, "on mps")])
def test_where_compiling_is_untried_nothing_is_compiled(compiler, monkeypatch, device, where, capsys):
    monkeypatch.setattr(processes, "torchrun", lambda: where == "under torchrun")
    assert compiling.choose(None, None, True, device) is False
    assert compiling.choose(False, True, True, device) is False
    assert capsys.readouterr().out == ""
    assert compiling.choose(None, True, True, device) is False
    assert capsys.readouterr().out.endswith(f"without torch.compile: compiling is untried {where}.\n")
    with pytest.raises(ValueError, match=f"compiled: expected False {where}, where it is untried, got True"):
        compiling.choose(True, None, True, device)


# --- what a run asks for ----------------------------------------------------------------------------------------------


class Begun(ValueError):
    """Raised instead of training."""


@pytest.fixture
def asked(compiler, monkeypatch) -> list[bool]:
    """A list that collects, for each training that begins and ends at once, whether it is to be compiled."""
    found = []

    def begin(flow: nn.Module, data: Tensor, steps: int | None, *, compiled: bool, **options) -> None:
        found.append(compiled)
        raise Begun

    monkeypatch.setattr(trainer, "train", begin)
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),  # the table's budget is 30 s
        (["--budget", "10m"], False),
        (["--budget", "11m"], True),
        (["--budget", "11m", "--no-compile"], False),
        (["--compile"], True),
        (["--steps", "1000000"], False),
        (["--steps", "100", "--compile"], True),
    ],
)
def test_the_command_line_decides_by_time_and_words(asked, words, expected, tmp_path):
    assert main(["train", NAME, "--out", str(tmp_path), *words]) == 1
    assert asked == [expected]


@pytest.mark.parametrize("minutes", [9, 25])
def test_without_a_budget_the_table_s_decides(asked, minutes, monkeypatch, tmp_path):
    monkeypatch.setitem(table.RUNS, "timed", table.Run(**vars(table.find(NAME)) | {"budget": 60 * minutes}))
    for options in ({}, {"resume": True}):  # there is no checkpoint
        with pytest.raises(Begun):
            runs.train("timed", tmp_path, **options)
    assert asked == [minutes > 10] * 2


@pytest.mark.parametrize(("settings", "kept"), [({}, False), ({"compiled": False}, False), ({"compiled": True}, True)])
def test_a_resumed_run_does_what_its_checkpoint_says(asked, settings, kept, monkeypatch, tmp_path):
    """This holds for every length; checkpoints that do not say it are of runs that were not compiled by default."""
    for seconds in (30.0, HOUR):
        facts = {"asked": {"steps": None, "budget": seconds}, "settings": settings}
        monkeypatch.setattr(trainer, "read_checkpoint", lambda folder, facts=facts: facts)
        for compiled in (None, True, False):
            with pytest.raises(Begun):
                runs.train(NAME, tmp_path, resume=True, compiled=compiled)
    assert asked == [kept, True, False] * 2


@pytest.mark.parametrize(("budget", "end"), [(None, ""), (HOUR, " --no-compile")])
def test_the_command_in_a_record_repeats_what_was_done(monkeypatch, budget, end, tmp_path):
    """The record of a long run that was not compiled names --no-compile, since another machine may have a compiler."""
    train = trainer.train

    def few_steps(flow: nn.Module, data: Tensor, steps: int | None, *, budget: float, **options) -> trainer.History:
        return train(flow, data, 2, **options | {"warmup": 0})

    monkeypatch.setattr(compiling, "has_compiler", lambda device: False)
    monkeypatch.setattr(trainer, "train", few_steps)
    runs.train(NAME, tmp_path, budget=budget, draws=1)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == f"python -m nflows_lib train {NAME} --budget {budget or 30:g}s{end}"
    assert record["settings"]["compiled"] is False


# --- the step that tries it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("works", [True, False])
def test_the_step_that_tries_a_compiler_changes_nothing(works, monkeypatch, capsys):
    """The batch norm's averages, the random state and a gradient from before stay the same."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        def call(*given: Tensor) -> tuple[Tensor, ...]:
            if not works:
                raise RuntimeError("at the first call\nof many")
            return graph.forward(*given)

        return call

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda flow: compile(flow, backend=backend))
    torch._dynamo.reset()
    torch.manual_seed(0)
    flow = runs.realnvp((1, 4, 4), couplings=2, hidden=4, blocks=1).train()
    batch = torch.randint(0, 256, (8, 1, 4, 4))
    flow.initialize(batch)
    flow(batch, validate=False)  # the batch norm's averages move
    state, random = {name: tensor.clone() for name, tensor in flow.state_dict().items()}, torch.get_rng_state()
    made = compiling.compile_flow(flow, batch, None)
    assert (made is flow) is not works
    assert torch.equal(torch.get_rng_state(), random)
    assert flow.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())
    said = "torch.compile failed, so the run goes on without it: RuntimeError: at the first call\n"
    assert capsys.readouterr().out == ("" if works else said)
    found = []
    for step in (flow, made):
        flow.load_state_dict(state)
        torch.set_rng_state(random)
        found.append(step(batch, validate=False))
    torch.testing.assert_close(*found)
    torch._dynamo.reset()
