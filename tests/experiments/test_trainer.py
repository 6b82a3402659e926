"""Tests of the trainer: a run that was interrupted, killed or out of disk space goes on as if it had never stopped.

Its parameters must equal, to the bit, those that fit(), which has no checkpoints, reaches without a stop.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import command_process
import forked
import pytest
import torch
from bijections import Masked, randomize
from test_training import ZEROS, Recorder, log_scale, noisy_nice, scaling, sgd
from torch import Tensor

from nflows_lib.__main__ import main
from nflows_lib.bijection import Layer
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling, alternating_mask
from nflows_lib.data import digit_halves, digits
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import checkpoint, trainer
from nflows_lib.experiments.checkpoint import CheckpointError
from nflows_lib.experiments.image_sets import random_flip
from nflows_lib.experiments.segmentation import random_view
from nflows_lib.experiments.trainer import CHECKPOINT, LOCK, PREVIOUS, Interrupted, Schedule, train
from nflows_lib.flow import Flow
from nflows_lib.models import cglow, glow, nice
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling, FlowBatchNorm
from nflows_lib.training import Average, History, NonFiniteLoss, fit

STEPS = 24
OPTIONS = {
    "steps": STEPS,
    "batch_size": 10,  # 4 steps per epoch: a stop at step 6 or 18 is inside an epoch
    "lr": 1e-2,
    "clip": 1.0,
    "warmup": 8,
    "cosine": True,
    "ema": 0.9,
    "evaluations": 4,
    "save_every": -1.0,  # after every step
}


class Stop(Exception):
    """Raised by a test to end a run in the midst."""


def nice_run(
    folder: Path | None = None, at: int | None = None, act=None, **options
) -> tuple[dict[str, Tensor], History]:
    """A small NICE run from a seed; ``act`` is called in the evaluation after step ``at``."""
    flow, data = noisy_nice()
    torch.manual_seed(1)
    if options.get("resume") and any(folder.glob("*.safetensors")):
        # The initial state of a resumed process must not affect the result.
        randomize(flow, 3.0)
        torch.manual_seed(99)

    def on_evaluation(judged: Flow, history: History) -> None:
        torch.rand(5)
        if history.held_out[-1][0] == at:
            act()

    options = {**OPTIONS, "held_out": data[:9], "on_evaluation": on_evaluation, **options}
    if folder is None:
        history = fitted(flow, data, **options)
    else:
        history = train(flow, data, folder=folder, **options)
    assert not flow.training
    return flow.state_dict(), history


def fitted(flow: Flow, data: Tensor, on_evaluation=None, **options) -> History:
    """The same run by fit(), whose callback is called after each step."""

    def callback(flow: Flow, history: History) -> None:
        if on_evaluation is not None and history.held_out and history.held_out[-1][0] == len(history.loss):
            on_evaluation(flow, history)

    return fit(flow, data, callback=callback, **{k: v for k, v in options.items() if k != "save_every"})


def stop() -> None:
    raise Stop


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def step_of(folder: Path) -> int:
    return trainer.read_checkpoint(folder)["step"]


def assert_same(found: tuple[dict[str, Tensor], History], expected: tuple[dict[str, Tensor], History]) -> None:
    for name in expected[0]:
        assert torch.equal(found[0][name], expected[0][name]), name
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def uninterrupted():
    return nice_run()


# --- stop and resume --------------------------------------------------------------------------------------------------


def test_writing_checkpoints_changes_nothing(tmp_path, uninterrupted):
    assert_same(nice_run(tmp_path), uninterrupted)
    assert sorted(os.listdir(tmp_path)) == sorted([CHECKPOINT, PREVIOUS, LOCK])
    assert step_of(tmp_path) == STEPS
    assert checkpoint.load_facts(tmp_path / PREVIOUS)["step"] == STEPS - 1


@pytest.mark.parametrize("at", [6, 12, 18])
def test_a_run_that_failed_goes_on_to_the_same_parameters(tmp_path, uninterrupted, at):
    with pytest.raises(Stop):
        nice_run(tmp_path, at, stop)
    assert step_of(tmp_path) == at - 1
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("save_every", [-1.0, 1e9])
def test_an_interrupted_run_saves_its_step_and_goes_on_to_the_same_parameters(
    tmp_path, uninterrupted, number, save_every
):
    with pytest.raises(Interrupted, match=f"stopped after step 6 of {STEPS}"):
        nice_run(tmp_path, 6, lambda: interrupt(number), save_every=save_every)
    assert step_of(tmp_path) == 6
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


def test_a_run_interrupted_again_and_again_goes_on_to_the_same_parameters(tmp_path, uninterrupted):
    for at in (6, 12, 18):
        with pytest.raises(Interrupted):
            nice_run(tmp_path, at, interrupt, resume=True)
        assert step_of(tmp_path) == at
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


def test_an_augmented_run_goes_on_to_the_same_parameters(tmp_path, uninterrupted):
    def flip(x: Tensor) -> Tensor:
        """An augmentation that mirrors each example as an image of one row."""
        return random_flip(x[:, None, None]).flatten(1)

    with pytest.raises(Interrupted):
        nice_run(tmp_path, 6, interrupt, augment=flip)
    expected = nice_run(augment=flip)
    assert_same(nice_run(tmp_path, resume=True, augment=flip), expected)
    assert expected[1] != uninterrupted[1]


@pytest.mark.parametrize("name", ["adam", "two groups", "momentum"])
def test_a_given_optimizer_goes_on_too(tmp_path, name):
    makers = {
        "adam": lambda flow: torch.optim.Adam(flow.parameters(), lr=1e-2),
        "two groups": lambda flow: torch.optim.AdamW(
            [{"params": [*flow.parameters()][:-1]}, {"params": [*flow.parameters()][-1:], "lr": 0.1}], lr=1e-2
        ),
        "momentum": lambda flow: torch.optim.SGD(flow.parameters(), lr=1e-3, momentum=0.9),
    }

    def run(steps_until=None, **options):
        flow, data = noisy_nice()
        torch.manual_seed(1)

        def act(judged, history):
            if len(history.loss) == steps_until:
                interrupt()

        settings = {**OPTIONS, "ema": None, "held_out": data[:9], "on_evaluation": act, **options}
        history = (train if "folder" in options else fitted)(flow, data, optimizer=makers[name](flow), **settings)
        return flow.state_dict(), history

    with pytest.raises(Interrupted):
        run(6, folder=tmp_path)
    assert_same(run(folder=tmp_path, resume=True), run())


def test_context_rows_stay_with_their_examples_over_a_resume(tmp_path):
    data = torch.arange(20.0)[:, None]
    seen = []
    for resume in (False, True):
        torch.manual_seed(0)
        recorder = Recorder()
        options = {"context": 10 * data, "batch_size": 5, "lr": 1e-9, "held_out": data[:2], "evaluations": 4}
        options |= {"held_out_context": data[:2], "folder": tmp_path, "resume": resume}
        act = None if resume else lambda flow, history: interrupt() if len(history.loss) == 2 else None
        try:
            train(scaling(1, recorder), data, 4, on_evaluation=act, **options)
        except Interrupted:
            assert not resume
        seen += recorder.seen
        assert (
            bool(recorder.initialized_with) is not resume
        )  # parameters that are initialised from data are not initialised again
    assert sorted(torch.cat([x for x, _, _ in seen]).flatten().tolist()) == data.flatten().tolist()  # one whole epoch
    assert all(torch.equal(context, 10 * x) for x, context, _ in seen)
    assert all(mode for _, _, mode in seen)


def conditional_run(folder: Path | None = None, at: int | None = None, **options) -> tuple[dict[str, Tensor], History]:
    """A small conditional Glow on halves of digits with random views, interrupted after step ``at``."""
    images = digit_halves("test")
    torch.manual_seed(1 if options.get("resume") else 0)
    flow = cglow((1, 4, 8), (1, 4, 8), levels=17, scales=2, steps=1, hidden=4, conditioning=4)

    def on_evaluation(judged: Flow, history: History) -> None:
        if history.held_out[-1][0] == at:
            interrupt()

    pairs = {"context": images.contexts, "held_out": images.images[:9], "held_out_context": images.contexts[:9]}
    options = {**OPTIONS, "steps": 8, "augment": random_view, "on_evaluation": on_evaluation, **pairs, **options}
    if folder is None:
        history = fitted(flow, images.images, **options)
    else:
        history = train(flow, images.images, folder=folder, **options)
    return flow.state_dict(), history


def test_a_conditional_run_goes_on_to_the_same_parameters(tmp_path):
    """Contexts and random views are those of the uninterrupted run; nothing is initialised again."""
    with pytest.raises(Interrupted):
        conditional_run(tmp_path, 4)
    assert step_of(tmp_path) == 4
    expected = conditional_run()
    assert_same(conditional_run(tmp_path, resume=True), expected)
    with pytest.raises(CheckpointError, match="another run's: expected augment None, got random_view"):
        conditional_run(tmp_path, resume=True, augment=None)


def test_resume_without_a_checkpoint_starts(tmp_path, uninterrupted):
    flow, data = noisy_nice()
    torch.manual_seed(1)
    history = train(flow, data, folder=tmp_path / "new", resume=True, held_out=data[:9], **OPTIONS)
    assert_same((flow.state_dict(), history), uninterrupted)


def test_a_folder_with_a_checkpoint_is_refused_without_resume(tmp_path):
    nice_run(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match="folder: expected a folder without a checkpoint, or resume=True"):
        nice_run(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    (tmp_path / CHECKPOINT).unlink()  # the previous checkpoint counts as well
    with pytest.raises(ValueError, match="folder: expected a folder without a checkpoint"):
        nice_run(tmp_path)


def wider(flow: Flow) -> Flow:
    return nice(4, levels=5, couplings=2, hidden=9, depth=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "another run's: expected batch_size 8, got 10"),
        ({"lr": 2e-2}, "another run's: expected optimizer .*0.02.*, got .*0.01"),
        ({"augment": random_flip}, "another run's: expected augment random_flip, got None"),
        ({"clip": None}, "another run's: expected clip None, got 1.0"),
        ({"warmup": 3}, "another run's: expected warmup 3, got 8"),
        ({"cosine": False}, "another run's: expected cosine False, got True"),
        ({"ema": 0.99}, "another run's: expected ema 0.99, got 0.9"),
        ({"ema": None}, "another run's: expected ema None, got 0.9"),
        ({"model": wider}, r"another model's: expected .* with shape \(9"),
        ({"examples": 39}, "another run's: expected examples 39, got 40"),
        ({"sgd": True}, "another run's: expected optimizer .*SGD"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_the_checkpoint_still_good(tmp_path, uninterrupted, options, message):
    with pytest.raises(Interrupted):
        nice_run(tmp_path, 6, interrupt)
    before = (tmp_path / CHECKPOINT).read_bytes()
    options = dict(options)
    flow, data = noisy_nice()
    flow = options.pop("model", lambda flow: flow)(flow)
    data = data[: options.pop("examples", 40)]
    optimizer = sgd(flow) if options.pop("sgd", False) else None
    with pytest.raises(CheckpointError, match=f"^{CHECKPOINT}: {message}"):
        train(flow, data, folder=tmp_path, resume=True, optimizer=optimizer, held_out=data, **{**OPTIONS, **options})
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


def test_data_with_other_numbers_are_another_run(tmp_path):
    """The number of examples is the same, but one number differs in the data or in a context."""
    data = torch.arange(20.0)[:, None]
    for place in ("data", "context"):
        given = {"data": data, "context": 10 * data}
        options = {"batch_size": 5, "lr": 1e-9, "folder": tmp_path / place}
        train(scaling(1, Recorder()), given["data"], 2, context=given["context"], **options)
        given[place] = given[place].clone()
        given[place][7] += 1
        with pytest.raises(CheckpointError, match=f"{CHECKPOINT}: another run's: expected checksum"):
            train(scaling(1, Recorder()), given["data"], 2, context=given["context"], resume=True, **options)


def test_a_checkpoint_of_an_earlier_version_goes_on_to_the_parameters_of_that_version(tmp_path):
    """The run began at commit c7af0c3 and stopped after 6 of 12 steps; the folder also holds its final state."""
    here = Path(__file__).parent / "begun_at_c7af0c3"
    (tmp_path / CHECKPOINT).write_bytes((here / CHECKPOINT).read_bytes())
    assert step_of(tmp_path) == 6
    flow = glow((1, 8, 8), levels=17, scales=2, steps=1, hidden=4)
    images = digits("test").images
    options = {"batch_size": 64, "lr": 1e-2, "clip": 1.0, "warmup": 3, "cosine": True, "ema": 0.9, "evaluations": 4}
    history = train(flow, images[20:], 12, held_out=images[:20], folder=tmp_path, resume=True, **options)
    expected, facts = checkpoint.load(here / "ended.safetensors")
    assert history.loss == pytest.approx(facts["loss"], rel=1e-4)
    torch.testing.assert_close(history.held_out, [tuple(found) for found in facts["held_out"]], rtol=1e-4, atol=1e-4)
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def adam(flow: Flow) -> torch.optim.Optimizer:
    """An optimizer of some of the parameters in another order: each moment must find its parameter."""
    couplings = [parameter for layer in flow.chain[2:-1] for parameter in layer.parameters()]
    groups = [{"params": couplings[::-1], "weight_decay": 0.1}, {"params": [flow.chain[-1].log_scale]}]
    return torch.optim.AdamW(groups, lr=1e-2)


@pytest.mark.parametrize("affine", [False, True])
def test_a_run_with_masked_couplings_goes_on_with_halves(tmp_path, affine):
    """Weights, average and Adam's moments of an earlier version's checkpoint are cut; later steps are the same."""
    coupling, parts = (AffineCoupling, 2) if affine else (AdditiveCoupling, 1)

    def flow(masked: bool) -> Flow:
        layers: list[Layer] = [UniformDequantize(5), Rescale(1 / 5)]
        for mask in (alternating_mask(5, 0), alternating_mask(5, 1)):
            passes = int(mask.sum())
            if masked:
                layers.append(Masked(mask, MLP(5, parts * 5, 8, 2), affine))
            else:
                layers.append(coupling(mask, MLP(passes, parts * (5 - passes), 8, 2)))
        return Flow([*layers, DiagonalScaling(5)], StandardNormal(), (5,))

    def run(masked: bool, folder: str, start: dict[str, Tensor] | None = None, **options) -> tuple:
        torch.manual_seed(0)
        data, made = torch.randint(5, (40, 5)), flow(masked)
        if start is None:
            randomize(made, 0.3)
        else:
            checkpoint.load_into(made, start, "start")
        first = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        torch.manual_seed(1)
        options = {**OPTIONS, "held_out": data[:9], "optimizer": adam(made), **options}
        history = train(made, data, folder=tmp_path / folder, **options)
        return first, checkpoint.unmasked(flow(False), made.state_dict()), history

    def stop_at_6(judged: Flow, history: History) -> None:
        if history.held_out[-1][0] == 6:
            interrupt()

    first, ended, expected = run(True, "masked")
    _, halves, history = run(False, "halves", first)
    with pytest.raises(Interrupted):
        run(True, "stopped", on_evaluation=stop_at_6)
    assert step_of(tmp_path / "stopped") == 6
    _, resumed, continued = run(False, "stopped", resume=True)
    for name, tensor in ended.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(halves[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for values in (history, continued):
        assert values.loss == pytest.approx(expected.loss, rel=1e-4)
        assert values.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        torch.testing.assert_close(values.held_out, expected.held_out, rtol=1e-4, atol=1e-4)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, uninterrupted):
    with pytest.raises(Interrupted):
        nice_run(tmp_path, 6, interrupt)
    newest = tmp_path / CHECKPOINT
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT}: expected a whole .* to go on from {PREVIOUS}"):
        nice_run(tmp_path, resume=True)
    newest.unlink()
    assert step_of(tmp_path) == 5
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


def test_a_kill_between_the_renames_goes_on_from_the_one_before(tmp_path, uninterrupted, monkeypatch):
    calls, replace = [], os.replace

    def killed(source, target):
        calls.append(target)
        if len(calls) == 13:  # one rename for the first checkpoint, two for each of the others
            raise SystemExit  # stands for the kill
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        nice_run(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / CHECKPOINT).exists()
    assert step_of(tmp_path) == 6
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


@pytest.mark.parametrize("operation", range(1, 10))
def test_a_kill_between_any_two_file_operations_leaves_a_checkpoint_that_goes_on(
    tmp_path, uninterrupted, monkeypatch, operation
):
    """The second and third checkpoint: each is opened, forced to the disk, and renamed after the previous one."""
    done: list[str] = []

    def counted(name, act):
        def acted(*args, **options):
            done.append(name)
            if sum(1 for _ in done) - first == operation:
                raise SystemExit  # this is the kill: no later operation takes place
            return act(*args, **options)

        return acted

    first = 3  # operations of the first checkpoint, which replaces none: open, force, rename
    monkeypatch.setattr(os, "replace", counted("rename", os.replace))
    monkeypatch.setattr(os, "fsync", counted("force", os.fsync))
    monkeypatch.setattr(Path, "open", counted("open", Path.open))
    with pytest.raises(SystemExit):
        nice_run(tmp_path)
    monkeypatch.undo()
    assert done[:3] == ["open", "force", "rename"]
    assert done[3:] == (["open", "force", "rename", "rename"] * 3)[:operation]
    assert step_of(tmp_path) == 1 + (operation - 1) // 4
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(tmp_path, uninterrupted, monkeypatch):
    fsync, calls = os.fsync, []

    def disk_full(descriptor):
        calls.append(descriptor)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(CheckpointError, match=f"{os.strerror(errno.ENOSPC)}; the last good one, {CHECKPOINT}"):
        nice_run(tmp_path)
    assert step_of(tmp_path) == 9
    assert sorted(os.listdir(tmp_path)) == sorted([CHECKPOINT, PREVIOUS, LOCK])
    assert_same(nice_run(tmp_path, resume=True), uninterrupted)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    flow = scaling()
    with pytest.raises(NonFiniteLoss):
        train(flow, ZEROS, 9, batch_size=4, optimizer=sgd(flow, 1e38), folder=tmp_path, save_every=-1.0)
    tensors, facts = checkpoint.load(tmp_path / CHECKPOINT)
    assert facts["step"] == 1
    assert len(tensors["history.loss"]) == 1
    assert tensors["history.loss"].isfinite().all()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    recorder = Recorder()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match=r"folder: expected a folder that can be written to, got .*file"):
            train(scaling(1, recorder), ZEROS, 2, batch_size=4, folder=folder)
    assert recorder.seen == []


def test_a_second_training_in_the_same_folder_is_refused(tmp_path):
    """It is refused in this process and in others while the first training runs; afterwards the folder is free."""
    refused = []

    def another(judged: Flow, history: History) -> None:
        with pytest.raises(
            ValueError, match="folder: expected a folder in which no other training runs, got "
        ) as caught:
            train(scaling(), ZEROS, 2, batch_size=4, folder=tmp_path, resume=True)
        refused.append(caught.value)
        script = (
            "import sys; from filelock import FileLock, Timeout\n"
            "try: FileLock(sys.argv[1], timeout=0).acquire()\n"
            "except Timeout: print('locked')"
        )
        done = subprocess.run([sys.executable, "-c", script, tmp_path / LOCK], capture_output=True, text=True)
        refused.append(done.stdout.strip())

    train(scaling(), ZEROS, 2, batch_size=4, folder=tmp_path, held_out=ZEROS, on_evaluation=another)
    assert len(refused) == 2
    assert refused[1] == "locked"
    train(scaling(), ZEROS, 2, batch_size=4, folder=tmp_path, resume=True)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [None, stop, interrupt])
def test_the_handlers_of_signals_are_put_back(tmp_path, act):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        nice_run(tmp_path, 6 if act else None, act)
    except (Stop, Interrupted):
        assert act is not None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Python's own signal handlers: a shell that starts the suite in the background makes it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handlers")
def test_a_second_interrupt_stops_at_once(tmp_path):
    reached = []

    def twice() -> None:
        interrupt()
        reached.append("after the first")
        interrupt()
        reached.append("after the second")

    with pytest.raises(KeyboardInterrupt) as caught:
        nice_run(tmp_path, 6, twice)
    assert caught.type is KeyboardInterrupt
    assert reached == ["after the first"]
    assert step_of(tmp_path) == 5


@pytest.mark.usefixtures("default_handlers")
def test_without_a_folder_an_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt) as caught:
        nice_run(None, 6, interrupt)
    assert caught.type is KeyboardInterrupt


def test_an_interrupt_at_any_moment_of_a_step_has_saved(tmp_path, monkeypatch):
    """Here it comes at the worst moment: after the loop has decided about saving, before it decides about stopping."""
    flow, data = noisy_nice()
    calls = []

    def monotonic() -> float:
        caller = sys._getframe(1).f_code.co_name
        calls.append(caller)
        if caller == "train" and calls.count("train") == 4:
            interrupt()
        return time.monotonic()

    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=monotonic))
    with pytest.raises(Interrupted, match="stopped after step") as caught:
        train(flow, data, folder=tmp_path, held_out=data[:9], **{**OPTIONS, "save_every": 1e9})
    assert f"step {step_of(tmp_path)} of" in str(caught.value)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_progress_grows_evenly_to_one():
    schedule = Schedule(warmup=0, cosine=True)
    assert schedule.progress(7) == 0  # no total yet
    schedule.plan(0, 10)
    assert [schedule.progress(step) for step in range(11)] == pytest.approx([step / 10 for step in range(11)])


def test_a_new_plan_goes_on_from_where_the_old_one_was():
    schedule = Schedule(warmup=0, cosine=True)
    schedule.plan(0, 100)
    progress, factor = schedule.progress(40), schedule.factor(40)
    for total in (50, 1000):
        schedule.plan(40, total)
        assert schedule.progress(40) == progress == 0.4
        assert schedule.factor(40) == factor
        values = [schedule.progress(step) for step in range(40, total + 1)]
        assert [b - a for a, b in pairwise(values)] == pytest.approx([0.6 / (total - 40)] * (total - 40))
        assert values[-1] == pytest.approx(1)
        assert schedule.factor(total) == pytest.approx(0, abs=1e-12)


def test_a_plan_after_the_first_steps_starts_there():
    schedule = Schedule(warmup=0, cosine=False)
    schedule.plan(25, 125)
    assert [schedule.progress(step) for step in (0, 25, 75, 125)] == [0, 0, 0.5, 1]


def test_a_warmup_that_is_longer_than_the_run_is_shortened_to_half_of_it():
    schedule = Schedule(warmup=100, cosine=False)
    schedule.plan(25, None)
    assert schedule.warmup == 100
    schedule.plan(25, 40)
    assert schedule.warmup == 20
    assert schedule.factor(39) == 1
    schedule = Schedule(warmup=100, cosine=False)
    schedule.plan(25, 100)
    assert schedule.warmup == 100


def test_factor_is_warmup_times_half_a_cosine():
    schedule = Schedule(warmup=4, cosine=True)
    assert [schedule.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]  # before there is a total
    schedule.plan(0, 1000)
    assert schedule.factor(0) == pytest.approx(0.25, rel=1e-4)
    assert schedule.factor(500) == pytest.approx(0.5)
    assert 0 < schedule.factor(999) < 1e-5
    constant = Schedule(warmup=4, cosine=False)
    constant.plan(0, 1000)
    assert [constant.factor(step) for step in (0, 3, 999)] == [0.25, 1, 1]


# --- a budget of time -------------------------------------------------------------------------------------------------


class Clock:
    """A clock that the flow's training steps move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(Recorder):
    """A flow whose steps take one second and later two, and whose evaluation takes ``judging`` seconds per example."""

    def __init__(
        self, clock: Clock, interrupt_at: int | None = None, slower_from: int = 10**9, judging: float = 0.0
    ) -> None:
        super().__init__()
        self.clock, self.interrupt_at, self.slower_from, self.judging = clock, interrupt_at, slower_from, judging

    def forward(self, x, context=None):
        if torch.is_grad_enabled():
            self.clock.now += 1 if len(self.seen) < self.slower_from else 2
            if len(self.seen) + 1 == self.interrupt_at:
                interrupt()
        else:
            self.clock.now += self.judging * len(x)
        return super().forward(x, context)

    def __deepcopy__(self, memo: dict) -> Slow:
        """A copy on the same clock, so that the average of a slow flow is slow, too."""
        return Slow(self.clock, None, self.slower_from, self.judging)


@pytest.fixture
def timed_run(tmp_path, monkeypatch):
    """Runs in one folder, each with a clock of its own, as in a process of its own."""

    def run(interrupt_at=None, slower_from=10**9, judging=0.0, folder=tmp_path, **options):
        torch.manual_seed(0)
        clock = Clock()
        monkeypatch.setattr(trainer, "time", clock)
        slow = Slow(clock, interrupt_at, slower_from, judging)
        flow = scaling(1, slow)
        options = {"batch_size": 2, "cosine": True, "ema": 0.5, "resume": True, **options}
        try:
            history = train(flow, torch.arange(4.0)[:, None], folder=folder, save_every=1e9, **options)
        except Interrupted:
            return len(slow.seen), None, flow
        return len(slow.seen), history, flow

    return run


def total_of(folder: Path) -> int:
    return trainer.read_checkpoint(folder)["schedule"]["total"]


def test_the_number_of_steps_fits_the_budget(timed_run):
    steps, history, _ = timed_run(budget=100)
    assert steps == len(history.loss) == 95  # a second each, and 5 % to spare


def test_the_number_of_steps_is_fixed_once(timed_run):
    assert timed_run(budget=100, slower_from=30)[0] == 95


@pytest.mark.parametrize("slower_from", [30, 60, 93])
def test_a_run_that_gets_slower_ends_within_its_budget(timed_run, slower_from):
    """95 steps would take up to 165 of 100 seconds; the evaluations plan fewer steps for the rest."""
    held_out = {"held_out": torch.zeros(2, 1), "evaluations": 20}
    steps, history, _ = timed_run(budget=100, slower_from=slower_from, **held_out)
    seconds = steps + max(0, steps - slower_from)
    assert 95 <= seconds <= 102
    assert steps == len(history.loss) == history.held_out[-1][0]
    assert len(history.held_out) == 20


@pytest.mark.parametrize(("afterwards", "steps"), [(0, 72), (30, 57)])
def test_a_budget_keeps_time_for_evaluations_during_and_after_the_training(timed_run, afterwards, steps):
    """At step 25, 28 seconds are over: the first batch is seen twice, and two evaluations are timed.

    Of the other 67 seconds, 20 are kept for 20 evaluations of 2 examples, and half a second for each example
    afterwards.
    """
    options = {"held_out": torch.zeros(2, 1), "evaluations": 20, "afterwards": afterwards}
    taken, history, _ = timed_run(budget=100, judging=0.5, **options)
    assert taken == len(history.loss) == steps == 25 + 95 - 28 - 20 - afterwards // 2
    assert len(history.held_out) == 20
    assert trainer.time.now - 1000 == steps + 3 + 20


def test_a_budget_keeps_at_most_half_of_itself_for_evaluations(timed_run):
    options = {"held_out": torch.zeros(2, 1), "evaluations": 20, "afterwards": 10**6}
    timed_run(budget=100, judging=0.5, **options)
    assert 45 <= trainer.time.now - 1000 <= 60


def test_a_run_whose_evaluations_get_slower_still_keeps_time_for_those_after_it(timed_run):
    """The flow takes twice as long from step 30 on; the last evaluation's time counts for those to come."""
    options = {"held_out": torch.zeros(2, 1), "evaluations": 20, "afterwards": 30}
    timed_run(budget=100, judging=0.5, slower_from=30, **options)
    assert 95 - 15 <= trainer.time.now - 1000 + 2 <= 102 - 15 + 2


def test_the_whole_step_is_timed(timed_run, monkeypatch):
    """The average of the parameters comes last in a step, and here takes a second, like the rest of the step."""

    update = Average.update

    def slow_average(average: Average) -> None:
        trainer.time.now += 1
        update(average)

    monkeypatch.setattr(Average, "update", slow_average)
    assert timed_run(budget=100)[0] == 47  # 25 steps are timed, then 45 of 95 seconds are left


def test_a_run_that_keeps_its_pace_keeps_its_number_of_steps(timed_run):
    options = {"budget": 100, "held_out": torch.zeros(2, 1), "evaluations": 20}
    assert timed_run(50, **options)[0] == 50
    assert timed_run(**options)[0] == 45


def test_a_budget_that_is_shorter_than_the_warmup_shortens_it(timed_run, tmp_path):
    assert timed_run(budget=60, warmup=500)[0] == 57
    facts = trainer.read_checkpoint(tmp_path)
    assert facts["schedule"]["warmup"] == 28
    assert facts["settings"]["warmup"] == 500  # what was asked for, which a resumed run must ask for again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.0, "steps": 2}, "steps, budget: expected exactly one of the two, got 2 and 1.0"),
        ({}, "steps, budget: expected exactly one of the two, got None and None"),
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"budget": 0.0}, "budget: expected a finite number of seconds above 0, got 0.0"),
        ({"budget": 1e20}, "budget: expected at most a year, 31,536,000 seconds, got 1e\\+20"),
        ({"budget": 9.0, "warmup": -1}, "warmup: expected at least 0, got -1"),
        ({"steps": 2, "warmup": 3}, "warmup: expected 0 to 2, the number of steps, got 3"),
    ],
)
def test_a_length_that_makes_no_sense_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(scaling(), ZEROS, batch_size=4, folder=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_budget_that_is_used_up_at_once_is_refused(timed_run):
    with pytest.raises(ValueError, match="budget: expected more than the 25 steps taken"):
        timed_run(budget=20)


def test_the_number_of_steps_is_kept_over_a_resume(timed_run, tmp_path):
    assert timed_run(50, budget=100)[0] == 50
    assert total_of(tmp_path) == 95
    assert trainer.read_checkpoint(tmp_path)["seconds"] == 50
    steps, history, _ = timed_run(budget=100, slower_from=0)
    assert steps == 45
    assert len(history.loss) == 95


def test_a_resume_before_the_number_of_steps_is_fixed_times_the_first_steps_again(timed_run, tmp_path):
    assert timed_run(10, budget=100)[0] == 10
    assert total_of(tmp_path) is None
    assert len(timed_run(budget=100)[1].loss) == 95  # the 10 seconds before count


@pytest.mark.parametrize("budget", [200, 80])
def test_another_budget_fits_the_rest_of_the_schedule_to_the_rest_of_the_time(timed_run, tmp_path, budget):
    timed_run(50, budget=100)
    before = Schedule(**trainer.read_checkpoint(tmp_path)["schedule"])
    assert len(timed_run(budget=budget)[1].loss) == 0.95 * budget
    after = Schedule(**trainer.read_checkpoint(tmp_path)["schedule"])
    assert (after.start, after.total) == (50, 0.95 * budget)
    assert after.progress(50) == before.progress(50)


@pytest.mark.parametrize("done", [10, 50])
def test_a_run_of_steps_can_go_on_with_a_budget(timed_run, done):
    timed_run(done, steps=1000)
    assert len(timed_run(budget=100)[1].loss) == 95


def test_a_run_with_a_budget_can_go_on_with_steps(timed_run):
    timed_run(50, budget=100)
    assert len(timed_run(steps=60)[1].loss) == 60


@pytest.mark.parametrize("asked", [{"budget": 200}, {"steps": 200}])
def test_a_finished_run_is_not_made_longer(timed_run, tmp_path, asked):
    timed_run(budget=100)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match="resume: expected an unfinished run, got one that has taken its 95 steps"):
        timed_run(**asked)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("asked", [{"budget": 100}, {"steps": 40}])
def test_a_finished_run_resumed_gives_its_averaged_flow_and_takes_no_step(timed_run, tmp_path, asked):
    _, history, flow = timed_run(**asked)
    before = (tmp_path / CHECKPOINT).read_bytes()
    steps, same_history, same_flow = timed_run(**asked)
    assert steps == 0
    assert same_history == history
    assert torch.equal(log_scale(same_flow), log_scale(flow))
    trained = checkpoint.load(tmp_path / CHECKPOINT)[0]["flow.chain.layers.1.log_scale"]
    assert not torch.equal(log_scale(flow), trained)  # the average is another flow
    assert not same_flow.training
    assert (tmp_path / CHECKPOINT).read_bytes() == before


# --- real processes ---------------------------------------------------------------------------------------------------


def command_line(out: Path, steps: int) -> list[str]:
    return [*f"train nice-digits --steps {steps} --save-every 0s --draws 1 --resume --out".split(), str(out)]


def start(words: list[str], said: Path) -> ForkServerProcess:
    """Start a process that runs the command line, forked from one that has imported torch already."""
    process = forked.context().Process(target=command_process.run, args=(words, said))
    process.start()
    return process


def reached(folder: Path, step: int) -> bool:
    try:
        return (trainer.read_checkpoint(folder) or {"step": 0})["step"] >= step
    except (FileNotFoundError, RuntimeError, checkpoint.CheckpointError):  # looked between two renames
        return False


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"the moments of the kills come from random.Random({seed})")
    moments = random.Random(seed)
    never, killed = tmp_path / "never", tmp_path / "killed"
    said = tmp_path / "said"
    reference = start(command_line(never, 110), said)
    amid = []
    for goal in sorted(moments.sample(range(1, 100), 5)):
        process = start(command_line(killed, 110), said)
        while process.is_alive() and not reached(killed, goal):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.05))  # anywhere in a step or in the writing of a checkpoint
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            amid.append(step_of(killed))
    print(f"killed after the steps {amid}")
    assert len(amid) >= 3  # the others came after its end
    last = start(command_line(killed, 110), said)
    last.join()
    reference.join()
    assert last.exitcode == reference.exitcode == 0
    for name in (CHECKPOINT, PREVIOUS, "model.safetensors"):
        expected, _ = checkpoint.load(never / name)
        found, _ = checkpoint.load(killed / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert step_of(killed) == 110
    assert not list(killed.glob("*.partial"))


def test_ctrl_c_says_how_to_go_on_and_that_goes_on(tmp_path, capsys):
    out = tmp_path / "a folder"
    process = start(command_line(out, 120), tmp_path / "said")
    try:
        while process.is_alive() and not (out / PREVIOUS).exists():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 130
    said = (tmp_path / "said").read_text(encoding="utf-8")
    stopped = int(re.search(r"stopped after step (\d+) of 120, and saved", said)[1])
    assert stopped == step_of(out) < 120
    again = shlex.split(re.search(r"To go on: (.*)", said)[1])
    assert again[:3] == ["python", "-m", "nflows_lib"]
    assert "--resume" in again
    assert main(again[3:]) == 0
    assert "120 steps in" in capsys.readouterr().out
    assert step_of(out) == 120
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 120
    assert "--steps 120" in record["command"]  # the command that gives this figure


def test_the_average_of_a_checkpoint_has_the_buffers_of_its_step(tmp_path):
    flow = Flow([FlowBatchNorm(2), DiagonalScaling(2)], StandardNormal(), (2,))
    train(flow, 3 + torch.randn(32, 2), 5, batch_size=16, ema=0.9, folder=tmp_path)
    saved = trainer.read_model(tmp_path)
    assert saved.keys() == flow.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in flow.state_dict().items())
    assert (saved["chain.layers.0.running_mean"] > 0.5).all()  # it was 0 at first
