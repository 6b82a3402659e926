"""Tests of precision: runs compute in bfloat16 if the device multiplies it, else in float32, and records say which."""

from __future__ import annotations

import json
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nflows_lib import data
from nflows_lib.experiments import checkpoint, precision, runs, sheets, table, trainer

CPU = torch.device("cpu")


def give_cpu(patch: pytest.MonkeyPatch, *instructions: str) -> None:
    """Pretend that the CPU has these instructions and no others."""
    known = types.MappingProxyType(
        {"avx2": True, "amx_bf16": False, "avx512_bf16": False} | dict.fromkeys(instructions, True)
    )
    patch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)


def precisions(model: nn.Module) -> set[torch.dtype]:
    return {module.precision for module in model.modules() if hasattr(module, "precision")}


@pytest.mark.parametrize("instructions", [("amx_bf16",), ("avx512_bf16",), ("amx_bf16", "avx512_bf16")])
def test_a_cpu_with_either_instruction_computes_in_bfloat16(monkeypatch, instructions):
    give_cpu(monkeypatch, *instructions)
    assert precision.fastest(CPU) == torch.bfloat16


def test_other_cpus_compute_in_float32(monkeypatch):
    give_cpu(monkeypatch, "avx512_f", "amx_tile", "amx_int8")
    assert precision.fastest(CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # of another architecture, say
    assert precision.fastest(CPU) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an old PyTorch
    assert precision.fastest(CPU) == torch.float32


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((8, 6), torch.bfloat16), ((10, 0), torch.bfloat16)],
)
def test_a_gpu_computes_in_bfloat16_from_compute_capability_8(monkeypatch, capability, expected):
    give_cpu(monkeypatch)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert precision.fastest(torch.device("cuda", 1)) == expected
    assert asked == [torch.device("cuda", 1)]


def test_on_a_mac_s_gpu_networks_compute_in_float32(monkeypatch):
    give_cpu(monkeypatch, "amx_bf16")
    assert precision.fastest(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("has", [True, False])
def test_runs_and_shipped_models_take_the_fastest_precision(monkeypatch, has):
    """One run of each model is built, and one shipped model is loaded."""
    give_cpu(monkeypatch, *(["amx_bf16"] * has))
    expected = {torch.bfloat16 if has else torch.float32}
    one_each = {run.model: run for run in table.RUNS.values() if run.budget < 3600}
    assert one_each.keys() == runs.MODELS.keys()
    for name, run in one_each.items():
        assert precisions(runs.build(run)) == (set() if name == "nice" else expected)
    assert precisions(runs.load_flow("glow-mnist")) == expected


def test_a_shipped_model_is_the_same_in_both(monkeypatch):
    """Both precisions agree within 0.01 bits/dim on images that the model draws."""
    found = []
    for instructions in ([], ["amx_bf16"]):
        give_cpu(monkeypatch, *instructions)
        flow = runs.load_flow("cglow-horses-small")
        torch.manual_seed(0)
        context = torch.rand(4, 3, 32, 32)
        masks = (torch.rand(4, 1, 32, 32) > 0.5).long()
        found.append(flow(masks, context))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.01 * 1024)
    assert not torch.equal(found[0], found[1])


RUN = table.Run(
    title="A Glow of a few steps",
    model="glow",
    size={"levels": 17, "scales": 1, "steps": 1, "hidden": 4},
    data="digits",
    shape=(1, 8, 8),
    budget=5,
    held_out=20,
    rates={"lr": 1e-3},
    training={"batch_size": 16},
)


@pytest.fixture
def begun(monkeypatch, tmp_path) -> Callable[[], Path]:
    """The folder of a run, put into the table, that is asked to stop after its first step."""
    monkeypatch.setitem(table.RUNS, "few", RUN)
    save_samples = sheets.save_samples

    def stop(*arguments, **options) -> None:
        monkeypatch.setattr(sheets, "save_samples", save_samples)
        os.kill(os.getpid(), signal.SIGINT)

    def begin() -> Path:
        monkeypatch.setattr(sheets, "save_samples", stop)
        with pytest.raises(trainer.Interrupted):
            runs.train("few", tmp_path, steps=20, draws=1)
        return tmp_path

    return begin


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_a_record_names_the_precision_and_a_resumed_run_keeps_it(monkeypatch, begun, first):
    """A resumed run keeps it on any machine; the trained model loads in the loading machine's precision."""
    give_cpu(monkeypatch, *(["amx_bf16"] * (first == "bfloat16")))
    folder = begun()
    give_cpu(monkeypatch, *(["amx_bf16"] * (first != "bfloat16")))
    flow = runs.train("few", folder, draws=1, resume=True)
    assert precisions(flow) == {getattr(torch, first)}
    assert json.loads((folder / "run.json").read_text())["settings"]["precision"] == first
    assert precisions(runs.load_flow("few", folder)) == {torch.bfloat16, torch.float32} - {getattr(torch, first)}


def test_a_checkpoint_from_before_goes_on_in_bfloat16(monkeypatch, begun):
    """Checkpoints that name no precision were written when every run computed in bfloat16."""
    give_cpu(monkeypatch, "amx_bf16")
    folder = begun()
    tensors, facts = checkpoint.load(folder / trainer.CHECKPOINT)
    del facts["settings"]["precision"]
    checkpoint.save(folder / trainer.CHECKPOINT, tensors, facts)
    give_cpu(monkeypatch)
    assert precisions(runs.train("few", folder, draws=1, resume=True)) == {torch.bfloat16}


def test_a_record_of_nice_says_float32(monkeypatch, tmp_path):
    give_cpu(monkeypatch, "amx_bf16")
    runs.train("nice-digits", tmp_path, steps=100, draws=1)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["precision"] == "float32"


def test_another_precision_is_another_run(tmp_path):
    """The trainer itself refuses to go on in another precision."""
    images = data.digits("train").images
    trainer.train(runs.build(RUN, networks_in=torch.bfloat16), images, 2, folder=tmp_path, batch_size=16)
    flow = runs.build(RUN, networks_in=torch.float32)
    with pytest.raises(checkpoint.CheckpointError, match="expected precision float32, got bfloat16"):
        trainer.train(flow, images, 3, folder=tmp_path, batch_size=16, resume=True)
