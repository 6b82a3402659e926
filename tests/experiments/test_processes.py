"""Tests of training with torchrun: two processes on the CPU compared with one, which takes the joint batches."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch
import two_processes
from torch import Tensor
from tqdm.auto import tqdm

from nflows_lib import settings, training
from nflows_lib.__main__ import main
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import processes, runs, trainer
from nflows_lib.experiments.checkpoint import CheckpointError
from nflows_lib.experiments.trainer import CHECKPOINT, PREVIOUS
from nflows_lib.flow import Flow
from nflows_lib.normalization import DiagonalScaling, mean_over_processes

TORCHRUN = ["--standalone", "--nproc-per-node", "2"]  # --standalone takes a free port
STEPS = 100  # of the run that is stopped


class Stopped(NamedTuple):
    """A run on the command line that Ctrl-C has stopped: its folder, exit status and output."""

    out: Path
    status: int
    said: str

    @property
    def again(self) -> list[str]:
        """The words of the command that resumes the run."""
        (words,) = re.findall(r"To go on: (.*)", self.said)
        return shlex.split(words)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    """A run under torchrun in a process group of its own, to which a terminal's signals can be sent."""
    folder = tmp_path_factory.mktemp("stopped")
    out, said = folder / "a folder", folder / "said"
    words = [*shlex.split(f"-m nflows_lib train nice-digits --steps {STEPS} --save-every 0s --out"), str(out)]
    process = forked.context().Process(target=two_processes.torchrun, args=([*TORCHRUN, *words], said))
    process.start()
    try:
        while process.is_alive() and not (out / PREVIOUS).exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        process.join(120)
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    return Stopped(out, process.exitcode, said.read_text(encoding="utf-8"))


class Job(NamedTuple):
    """The results of two processes that ran the functions of two_processes.py."""

    folder: Path
    status: int
    said: str

    def found(self, name: str) -> list[dict]:
        """What each process has found."""
        files = [self.folder / f"{name}{rank}.pt" for rank in (0, 1)]
        assert all(file.exists() for file in files), self.said
        return [torch.load(file) for file in files]


@pytest.fixture(scope="module")
def job(stopped, tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("two")
    said = folder / "said"
    process = forked.context().Process(target=two_processes.work, args=(folder, stopped.again[6:], said))
    process.start()
    process.join(240)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    return Job(folder, process.exitcode, said.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(job) -> list[dict]:
    """What each of two processes has found."""
    return job.found("")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


# --- two against one --------------------------------------------------------------------------------------------------


def test_two_processes_train_like_one_on_the_joint_batch(found, tmp_path):
    """Losses, gradients, held-out losses and parameters agree, those of batch norms and of the average included."""
    expected = two_processes.points(tmp_path)
    for process in found:
        for name in ("loss", "grad_norm", "held_out"):
            ours, theirs = process["points"]["history"][name], expected["history"][name]
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
            assert len(ours) == len(theirs)
        assert_equal(process["points"]["state"], expected["state"], rtol=1e-9, atol=1e-12)


def test_the_expected_run_depends_on_what_is_compared(found, tmp_path):
    """A run on half of each batch differs, so the comparison above could fail."""
    before, two_processes.OPTIONS["batch_size"] = two_processes.OPTIONS["batch_size"], 8
    try:
        other = two_processes.points(tmp_path)
    finally:
        two_processes.OPTIONS["batch_size"] = before
    difference = torch.tensor(other["history"]["loss"]) - torch.tensor(found[0]["points"]["history"]["loss"])
    assert difference.abs().max() > 0.1


def test_actnorm_is_the_same_everywhere_and_set_by_the_joint_batch(found, tmp_path):
    expected = two_processes.first_step(tmp_path)
    assert len(expected["batch"]) == 16
    for process in found:
        assert_equal(process["first step"]["state"], expected["state"])
        assert all(v for name, v in process["first step"]["state"].items() if name.endswith("initialized"))


def test_each_process_takes_its_own_examples_with_noise_of_its_own(found, tmp_path):
    batches = [process["first step"]["batch"] for process in found]
    assert [len(batch) for batch in batches] == [8, 8]
    joint = two_processes.first_step(tmp_path)["batch"]
    assert torch.equal(torch.cat(batches).floor(), joint.floor())
    assert not torch.equal(batches[0].frac(), batches[1].frac())
    initial, initial_of_1 = (process["first step"]["first"] for process in found)  # of the whole first batch
    assert len(initial) == 16
    assert torch.equal(initial, initial_of_1)
    assert ((initial[:8].frac() - batches[1].frac()).abs() < 1e-5).float().mean() < 0.1


@pytest.mark.parametrize("what", ["points", "first step", "images", "resumed"])
def test_all_processes_end_with_the_same_parameters(found, what):
    assert_equal(found[1][what]["state"], found[0][what]["state"])


def test_rank_0_evaluates_by_itself_and_all_know_the_losses(found):
    assert [process["points"]["called"] for process in found] == [[4, 8, 12], []]
    assert found[0]["points"]["history"] == found[1]["points"]["history"]


# --- stopping, going on, failing --------------------------------------------------------------------------------------


def test_where_one_is_stopped_all_are_and_go_on_to_the_same_parameters(found):
    for process in found:
        assert process["stopped"] == {"stopped": f"stopped after step {two_processes.STOP} of 12"}
        assert process["resumed"]["share"] == process["images"]["share"] == 8
        assert process["resumed"]["history"] == process["images"]["history"]
        assert_equal(process["resumed"]["state"], process["images"]["state"])


def test_a_run_of_two_does_not_go_on_with_one(found, job):
    with pytest.raises(CheckpointError, match=f"^{CHECKPOINT}: another run's: expected processes 1, got 2$"):
        two_processes.images(job.folder / "run", resume=True)


def test_what_one_meets_all_raise(found):
    for process in found:
        assert (
            process["errors"]["batch_size"] == "batch_size: expected a multiple of 2, the number of processes, got 15"
        )
        assert process["errors"]["loss"].startswith("the loss is inf at step 1;")


def test_a_budget_gives_one_number_of_steps(found):
    assert found[0]["budget"] == found[1]["budget"] > 25


def test_what_processes_tell_each_other(found):
    for rank, process in enumerate(found):
        assert process["broadcast"] == "of 0"
        assert process["gathered"] == [0, 1]
        assert process["any"] == (True, False, True)
        assert process["shard"].tolist() == [[0, 1, 2], [3, 4, 5]][rank]
        assert process["mean"] == {"mean": 1.5, "gradient": 4.5}
        assert process["laid out"].tolist() == [[0, 1.5], [3, 4.5], [6, 7.5]]
        assert process["after"] == (1, rank, "torchrun --standalone --nproc-per-node 2")


def test_one_process_gives_back_what_it_gets():
    values = torch.rand(3)
    assert mean_over_processes(values) is processes.shard(values) is processes.broadcast(values) is values
    assert processes.all_gather(7) == [7]
    assert processes.any_of(True, False) == (True, False)
    assert (processes.world_size(), processes.rank(), processes.launcher()) == (1, 0, "python")
    with processes.process_group() as device:
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert processes.world_size() == 1


def test_what_one_alone_meets_ends_all(found, job):
    """torchrun must see an error that only rank 0 has: a full disk, a failing callback."""
    assert job.status != 0
    assert "OSError: no space left" in job.said
    assert (job.folder / "fail").exists()
    assert not list((job.folder / "fail").glob("*.safetensors"))


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    """A process has the GPU of its local rank; without torchrun it has the first GPU and no group."""
    said = []
    monkeypatch.delenv("NFLOWS_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append(str(device)))
    monkeypatch.setattr(processes.dist, "init_process_group", said.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: said.append("left"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    with processes.process_group() as device:
        assert (str(device), said) == ("cuda", [])
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    with processes.process_group() as device:
        assert (str(device), said) == ("cuda:3", ["cuda:3", "cpu:gloo,cuda:nccl"])
    assert said[2:] == ["left"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    message = r"^nproc-per-node: expected at most 3, the number of GPUs, got at least 4$"
    with pytest.raises(ValueError, match=message), processes.process_group():
        pass
    monkeypatch.setenv("NFLOWS_DEVICE", "cpu")
    said.clear()
    with processes.process_group() as device:
        assert (str(device), said) == ("cpu", ["gloo"])


def test_after_an_error_no_process_waits_for_the_others(monkeypatch):
    """Leaving the group could wait for the other processes, and they could wait for this one."""
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes.dist, "init_process_group", said.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: said.append("left"))
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="in the midst"), processes.process_group():
        raise RuntimeError("in the midst")
    assert said == ["gloo"]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_shows_a_bar(monkeypatch, tmp_path, rank):
    shown = []

    def bar(**options: object) -> tqdm:
        shown.append(not options["disable"])
        return tqdm(**options | {"disable": True})

    monkeypatch.setattr(settings, "tqdm", bar)
    monkeypatch.setattr(settings, "progress", lambda: True)
    monkeypatch.setattr(processes, "rank", lambda: rank)
    flow = Flow([DiagonalScaling(2)], StandardNormal(), (2,))
    trainer.train(flow, torch.randn(16, 2), 2, folder=tmp_path, batch_size=8)
    assert shown == [rank == 0]


def test_several_processes_go_on_when_asked_twice(monkeypatch):
    """A process alone stops at once, but under torchrun the second signal is the first one, passed on."""
    monkeypatch.setattr(processes, "torchrun", lambda: True)
    before = signal.getsignal(signal.SIGINT)
    with trainer._stop_requested() as noted:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_only_rank_0_measures_and_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "train", lambda *_, **__: training.History())
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert isinstance(runs.train("nice-digits", tmp_path, steps=1), Flow)
    assert list(tmp_path.iterdir()) == []


def test_one_process_draws_the_shuffle_the_noise_of_the_first_batch_and_that_of_the_steps(tmp_path):
    """The draws come from one seed in this order, on which the runs of the records depend."""
    found = two_processes.first_step(tmp_path)
    data = torch.randint(8, (32, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    batch = data[torch.randperm(32)[:16]].float()
    for name in ("first", "batch"):
        torch.testing.assert_close(found[name], batch + torch.rand_like(batch))


# --- the command line -------------------------------------------------------------------------------------------------


def test_ctrl_c_under_torchrun_saves_and_says_how_to_go_on(stopped):
    assert stopped.status != 0
    assert re.findall(rf"stopped after step \d+ of {STEPS}, and saved", stopped.said)
    assert stopped.again[:5] == ["torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    assert stopped.again[5:7] == ["nflows_lib", "train"]
    assert "--resume" in stopped.again


def test_the_command_that_it_says_goes_on(stopped, job):
    ours, others = job.found("command-")
    assert ours["status"] == others["status"] == 0
    assert f"{STEPS} steps in" in ours["printed"]
    assert others["printed"] == ""  # one of them speaks
    record = json.loads((stopped.out / "run.json").read_text())
    (step,) = re.findall(r"stopped after step (\d+)", stopped.said)
    assert int(step) < record["steps"] == STEPS
    launcher = "torchrun --standalone --nproc-per-node 2"
    assert record["command"] == f"{launcher} -m nflows_lib train nice-digits --steps {STEPS}"
    assert record["settings"]["processes"] == 2
    assert record["hardware"].startswith("2 × ")
    assert record["figure"]["bits_per_dim"] < record["curve"]["held_out"][0][1] - 0.2


def test_one_process_does_not_go_on_with_what_two_have_begun(stopped, capsys):
    assert main(stopped.again[6:]) == 1
    assert "expected processes 1, got 2" in capsys.readouterr().err
