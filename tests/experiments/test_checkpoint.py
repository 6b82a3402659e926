"""Tests of checkpoints: they are written whole or not at all, and errors say what is wrong."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from bijections import Masked, randomize
from torch import Tensor, nn

from nflows_lib.bijection import Bijection
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling, alternating_mask
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import checkpoint
from nflows_lib.experiments.checkpoint import CheckpointError
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling

TENSORS = {
    "float": torch.randn(3, 4),
    "half": torch.randn(5).half(),
    "mask": torch.tensor([True, False]),
    "order": torch.tensor([3, 1, 2]),
    "state": torch.arange(9, dtype=torch.uint8),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0),
    "turned": torch.randn(4, 3).T,  # not contiguous
}
FACTS = {"step": 7, "asked": {"steps": None}, "curve": [1.5, 2.0]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.safetensors"


@pytest.fixture
def saved(path):
    checkpoint.save(path, TENSORS, FACTS)
    return path


def test_tensors_and_facts_come_back(saved):
    tensors, facts = checkpoint.load(saved)
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert checkpoint.load_facts(saved) == FACTS
    assert os.listdir(saved.parent) == [saved.name]


def test_the_file_is_json_and_numbers_never_pickle(saved):
    content = saved.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["facts"]) == FACTS
    sizes = [tensor.element_size() * tensor.numel() for tensor in TENSORS.values()]
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + sum(sizes)  # and not a byte besides


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: expected a whole checkpoint, got [\d,]+"):
        checkpoint.load(saved)


def test_another_file_is_no_checkpoint(path):
    path.parent.mkdir()
    path.write_text("a letter to a friend, long enough to have a header\n")
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        checkpoint.load_facts(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(path.with_name("none"))


def test_a_full_disk_is_an_error_and_keeps_the_last_good_one(saved, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the last good one, checkpoint\.safetensors, is"
    ):
        checkpoint.save(saved, {"other": torch.ones(10)}, {}, previous=saved.with_name("previous"))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_that_may_not_grow_is_an_error_and_keeps_the_last_good_one(saved):
    """The operating system itself refuses in the middle of the writing."""
    resource = pytest.importorskip("resource")
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write 0\.4 MiB .* the last good one"):
            checkpoint.save(saved, {"other": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_the_older_one_moves_to_previous(saved):
    previous = saved.with_name("previous")
    checkpoint.save(saved, {"other": torch.ones(1)}, {"step": 8}, previous=previous)
    assert checkpoint.load_facts(saved) == {"step": 8}
    assert checkpoint.load_facts(previous) == FACTS


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_between_two_renames_one_whole_file_is_left(saved, monkeypatch, renames):
    class Killed(BaseException):
        pass

    replace, done = os.replace, []

    def kill(source, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    previous = saved.with_name("previous")
    with pytest.raises(Killed):
        checkpoint.save(saved, {"other": torch.ones(1)}, {"step": 8}, previous=previous)
    assert checkpoint.load_facts(previous if renames else saved) == FACTS


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 3), r"expected bias with shape \(2,\), got shape \(3,\)"),
        (nn.Linear(3, 2, bias=False), r"expected bias with shape \(2,\), got no such tensor"),
        (nn.Sequential(nn.Linear(3, 2)), r"another model's: expected no tensor 0\.bias, got shape \(2,\)"),
    ],
)
def test_another_models_tensors_are_refused_whole(other, message):
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_into(model, other.state_dict(), "it")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def masked_coupling(mask: Tensor, affine: bool, context: int = 0) -> tuple[Masked, Bijection]:
    """A masked coupling on whole vectors with random parameters, and one of the library's couplings on halves."""
    dims, passes, parts = len(mask), int(mask.sum()), 1 + affine
    sizes = {"hidden": 6, "depth": 2, "activation": nn.Tanh, "context": context}
    masked = Masked(mask, MLP(dims, parts * dims, **sizes), affine)
    randomize(masked)
    network = MLP(passes, parts * (dims - passes), **sizes)
    return masked, (AffineCoupling if affine else AdditiveCoupling)(mask, network)


MASKS = [alternating_mask(dims, parity) for dims in (2, 5, 6) for parity in (0, 1)]
MASKS += [torch.tensor([True, True, False, False, False])]


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join(map(str, mask.int().tolist())))
@torch.no_grad()
def test_a_masked_coupling_of_an_earlier_version_loads_as_the_same_function(mask, affine, context):
    """It does so alone and inside a flow; a state dict of halves loads unchanged."""
    torch.manual_seed(0)
    masked, halves = masked_coupling(mask, affine, context)
    checkpoint.load_into(halves, masked.state_dict(), "masked")
    x, given = torch.randn(50, len(mask)), torch.randn(50, context) if context else None
    for found, expected in zip(halves(x, given), masked(x, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(halves.inverse(x, given), masked.inverse(x, given), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(halves(x, given)[0], x)

    _, other = masked_coupling(mask, affine, context)
    flows = [Flow([DiagonalScaling(len(mask)), layer], StandardNormal(), mask.shape) for layer in (masked, other)]
    checkpoint.load_into(flows[1], flows[0].state_dict(), "masked")
    torch.testing.assert_close(flows[1](x, given), flows[0](x, given), rtol=1e-6, atol=1e-6)
    again = checkpoint.unmasked(flows[1], flows[1].state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in flows[1].state_dict().items())


def test_the_mask_of_the_file_says_what_of_a_masked_coupling_is_kept():
    torch.manual_seed(0)
    masked, _ = masked_coupling(alternating_mask(6, 1), affine=True)
    _, halves = masked_coupling(alternating_mask(6, 0), affine=True)
    checkpoint.load_into(halves, masked.state_dict(), "masked")
    x = torch.randn(5, 6)
    torch.testing.assert_close(halves(x), masked(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(1, 2, 3, dtype=torch.bool)}, r"expected mask with shape \(6,\), got shape \(1, 2, 3\)"),
        ({"mask": alternating_mask(5, 0)}, r"expected mask with shape \(6,\), got shape \(5,\)"),
        ({"network.layers.0.weight": torch.ones(6, 7)}, r"0\.weight with shape \(6, 3\), got shape \(6, 7\)"),
        ({"network.layers.0.weight": torch.ones(5, 6)}, r"0\.weight with shape \(6, 3\), got shape \(5, 6\)"),
        ({"network.layers.4.bias": torch.ones(6)}, r"4\.bias with shape \(6,\), got no such tensor"),
        ({"network.layers.4.bias": torch.ones(13)}, r"4\.bias with shape \(6,\), got shape \(13,\)"),
        ({"network.layers.4.weight": torch.ones(12, 5)}, r"4\.weight with shape \(6, 6\), got shape \(12, 5\)"),
    ],
)
def test_a_masked_coupling_of_another_size_is_refused_whole(change, message):
    masked, halves = masked_coupling(alternating_mask(6, 0), affine=True)
    tensors = masked.state_dict() | change
    if "no such tensor" in message:
        del tensors["network.layers.4.bias"]
    before = {name: tensor.clone() for name, tensor in halves.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"it: another model's: .*{message}"):
        checkpoint.load_into(halves, tensors, "it")
    assert all(torch.equal(tensor, before[name]) for name, tensor in halves.state_dict().items())


def test_half_precision_is_for_matrices_and_loads_as_float32():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    halved = checkpoint.halve(model.state_dict())
    assert halved["weight"].dtype == torch.float16
    assert halved["bias"].dtype == torch.float32
    checkpoint.load_into(other, halved, "it")
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, model.weight.half().float())


def test_tensors_that_share_memory_are_written_apart(path):
    mask = torch.tensor([True, False, True])
    checkpoint.save(path, {"first": mask, "second": mask, "part": mask[1:]}, {})
    tensors, _ = checkpoint.load(path)
    assert torch.equal(tensors["first"], mask)
    assert torch.equal(tensors["second"], mask)
    assert torch.equal(tensors["part"], mask[1:])


def test_a_folder_that_is_a_file_is_an_error_of_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .* Not a directory|File exists"):
        checkpoint.save(tmp_path / "file" / "checkpoint", {}, {})


def test_the_new_file_is_on_the_disk_before_it_takes_the_old_ones_place(saved, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    checkpoint.save(saved, TENSORS, FACTS, previous=saved.with_name("previous"))
    assert order == ["fsync", "replace", "replace"]
