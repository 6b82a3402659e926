"""The environment variables, and check()."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nflows_lib import settings
from nflows_lib.checks import check

VARIABLES = ("NFLOWS_PRESET", "NFLOWS_SEED", "NFLOWS_DATA", "NFLOWS_PROGRESS", "NFLOWS_DEVICE")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_defaults():
    assert settings.preset() == "quick"
    assert settings.seed(3) == 3
    assert settings.data_folder() == Path(settings.__file__).resolve().parent.parent / "data"
    assert settings.progress()


def test_variables_are_obeyed(monkeypatch, tmp_path):
    for name, value in zip(VARIABLES, ("full", "2", str(tmp_path), "0", "cpu"), strict=True):
        monkeypatch.setenv(name, value)
    assert settings.preset() == "full"
    assert [settings.seed(), settings.seed(5)] == [2000, 2005]
    assert settings.data_folder() == tmp_path
    assert not settings.progress()


@pytest.mark.parametrize("value", ["-1", "1.5", "one", "", "²"])
def test_bad_seed(monkeypatch, value):
    monkeypatch.setenv("NFLOWS_SEED", value)
    with pytest.raises(ValueError, match=f"NFLOWS_SEED: expected a whole number from 0 on, got '{value}'"):
        settings.seed()


@pytest.mark.parametrize("value", ["", "Full", "fast"])
def test_bad_preset(monkeypatch, value):
    monkeypatch.setenv("NFLOWS_PRESET", value)
    with pytest.raises(ValueError, match=f'NFLOWS_PRESET: expected "quick" or "full", got \'{value}\''):
        settings.preset()


@pytest.fixture
def gpus(monkeypatch):
    """A function that sets which GPUs PyTorch finds."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # put back in the end

    def found(*names: str) -> None:
        for name in ("cuda", "mps"):
            monkeypatch.setattr(torch.get_device_module(name), "is_available", lambda name=name: name in names)

    return found


@pytest.mark.parametrize(
    ("found", "preset", "prefer_gpu", "device"),
    [
        ((), "full", None, "cpu"),
        (("cuda",), "quick", None, "cpu"),
        (("cuda",), "full", None, "cuda"),
        (("mps",), "full", None, "cpu"),  # only if it is named
        (("cuda",), "quick", True, "cuda"),
        (("cuda",), "full", False, "cpu"),
        ((), "quick", True, "cpu"),
    ],
)
def test_the_device_if_none_is_named(monkeypatch, gpus, found, preset, prefer_gpu, device):
    gpus(*found)
    monkeypatch.setenv("NFLOWS_PRESET", preset)
    assert settings.device(prefer_gpu) == torch.device(device)


@pytest.mark.parametrize(("named", "tf32"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_convolutions_on_cuda_are_in_float32(monkeypatch, gpus, named, tf32):
    gpus("cuda", "mps")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("NFLOWS_DEVICE", named)
    settings.device()
    assert torch.backends.cudnn.allow_tf32 == tf32


@pytest.mark.parametrize("named", ["cuda", "mps", "cpu"])
def test_a_device_that_is_named_is_taken(monkeypatch, gpus, named):
    gpus("cuda", "mps")
    monkeypatch.setenv("NFLOWS_DEVICE", named)
    for prefer_gpu in (None, True, False):
        assert settings.device(prefer_gpu) == torch.device(named)


@pytest.mark.parametrize("named", ["mps", "gpu", "", "CUDA", "meta"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, gpus, named):
    gpus("cuda")
    monkeypatch.setenv("NFLOWS_DEVICE", named)
    message = f'NFLOWS_DEVICE: expected "cuda" or "cpu", a device that PyTorch finds here, got {named!r}'
    with pytest.raises(ValueError, match=message):
        settings.device()


FALSE = [False, np.bool_(False), torch.tensor(False)]
TRUE = [True, np.bool_(True), torch.tensor(True)]


@pytest.mark.parametrize("holds", TRUE, ids=["bool", "numpy", "torch"])
def test_a_check_that_holds_prints_its_claim(capsys, holds):
    check("the sum is 4", holds)
    assert capsys.readouterr().out == "✓ the sum is 4\n"


@pytest.mark.parametrize("holds", FALSE, ids=["bool", "numpy", "torch"])
def test_a_check_that_fails_raises_its_claim_and_prints_nothing(capsys, holds):
    with pytest.raises(AssertionError, match="the sum is 4"):
        check("the sum is 4", holds)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("holds", [1, "yes", [False], math.nan, lambda: False, None, torch.ones(2, dtype=torch.bool)])
def test_a_check_takes_nothing_but_a_truth_value(holds):
    """Each of these except None would count as true, also a list of False."""
    with pytest.raises(ValueError, match="holds: expected one truth value, got"):
        check("the sum is 4", holds)
