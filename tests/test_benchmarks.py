"""The benchmark compares equal models, and its stored result follows from the rounds that it stores."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, run, scaling
from benchmarks.models import MODELS, OURS, Built
from nflows_lib.flow import Flow

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("c*.json"))  # cpu, cuda
SMALL: dict[str, dict[str, Any]] = {
    "glow": {"shape": (1, 4, 4), "scales": 2, "steps": 2, "hidden": 3},
    "realnvp": {"hidden": 5},
    "nice": {"dims": 6, "hidden": 5, "depth": 2},
}
EVERY = [(name, library) for name, model in MODELS.items() for library in (OURS, *model.peers)]
every_model_everywhere = pytest.mark.parametrize(("name", "library"), EVERY, ids=lambda word: word)


def made(name: str, library: str) -> tuple[Flow, Built, Tensor]:
    """A small model of ours with random parameters, the same model in another library, and a batch."""
    if library != OURS:
        pytest.importorskip(library.partition(",")[0])
    torch.manual_seed(0)
    flow = MODELS[name].ours(**SMALL[name]).module
    x = torch.rand(8, *flow.shape)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow.initialize(x)
    return flow, MODELS[name].make(flow, library, **SMALL[name]), x


@every_model_everywhere
@pytest.mark.filterwarnings("ignore::UserWarning")  # the peers call functions that PyTorch deprecates
def test_it_is_the_same_model(name: str, library: str) -> None:
    flow, built, x = made(name, library)
    models.check(MODELS[name], flow, built, x, **SMALL[name])
    with pytest.raises(AssertionError, match="parameters"):
        wrong = dataclasses.replace(built, extra=built.extra + 1)
        models.check(MODELS[name], flow, wrong, x, **SMALL[name])


@every_model_everywhere
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_log_prob_is_the_density_that_autograd_finds(name: str, library: str) -> None:
    _, built, x = made(name, library)
    built.module.double()
    for one in x[:2].double():

        def latent(vector: Tensor, shape: torch.Size = one.shape) -> Tensor:
            return torch.cat([piece.flatten() for piece in built.encode(vector.view(1, *shape))])

        z, jacobian = latent(one.flatten()), torch.autograd.functional.jacobian(latent, one.flatten())
        expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(built.log_prob(one[None])[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "parameters"), [("glow", 162_544), ("realnvp", 26_514), ("nice", 19_158_352)])
def test_ours_has_the_stated_size(name: str, parameters: int) -> None:
    model = MODELS[name]
    built = model.ours()
    assert built.parameters == parameters == model.parameters(**model.sizes) + built.extra
    assert models.couplings(built.module) == len(models.networks(built.module)) == model.couplings(**model.sizes)


def test_tasks_take_turns() -> None:
    calls: list[str] = []
    found = run.alternate({name: lambda name=name: calls.append(name) for name in "abc"}, 4, 0.0, "cpu")
    assert calls[-12:] == list("abc") * 4
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", 4)


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="needs Unix")
def test_what_takes_too_long_is_given_up() -> None:
    with pytest.raises(TimeoutError, match=r"^took more than 0\.05 s$"), run.at_most(0.05):
        time.sleep(5)


def test_networks_alone_see_what_they_see_in_the_flow() -> None:
    flow, _, x = made("glow", OURS)
    before = [parameter.clone() for parameter in flow.parameters()]
    run.networks_step(flow, x)()
    changed = [not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True)]
    inside = {id(parameter) for network in models.networks(flow) for parameter in network.parameters()}
    assert changed == [id(parameter) in inside for parameter in flow.parameters()]


def verify(content: dict[str, Any]) -> None:
    """Medians follow from the rounds, ratios from the medians, and verdicts from the ratios."""
    assert {"commit", "torch", "python", "hardware", "processor", "threads", "device", "versions"} <= content.keys()
    for result in content["models"].values():
        assert list(result["milliseconds"]) == [run.LOG_PROB, run.SAMPLE, run.STEP]
        assert set(result["mebibytes"]) == set(result["milliseconds"][run.STEP])
        assert all(value > 0 for value in result["mebibytes"].values())
        for entries in result["milliseconds"].values():
            assert set(result["parameters"]) <= set(entries)
            for entry in entries.values():
                rounds = entry["rounds"]
                assert len(rounds) == content["rounds"] and min(rounds) > 0
                assert entry["median"] == statistics.median(rounds)
                assert (entry["least"], entry["most"]) == (min(rounds), max(rounds))
                assert entry["ratio"] == pytest.approx(entry["median"] / entries[OURS]["median"], abs=6e-4)
    assert content["bars"] == run.bars(content["models"])
    text = run.table(content)
    for bar in content["bars"]:
        if bar["met"] is not None:
            steps = content["models"][bar["model"]]["milliseconds"][run.STEP]
            ratio = steps[OURS]["median"] / steps[bar["to"]]["median"]
            assert bar["met"] == (ratio <= bar["limit"])
        line = next(line for line in text.splitlines() if line.startswith(bar["name"]))
        assert line.endswith({True: ": met", False: ": MISSED", None: ": not measured"}[bar["met"]])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_stored_result_follows_from_its_rounds(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    verify(content)
    assert set(content["models"]) == set(MODELS) and content["rounds"] >= 7
    assert all(bar["met"] is not None for bar in content["bars"])
    for name, result in content["models"].items():
        assert set(result["parameters"]) == {OURS, *MODELS[name].peers}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_writes_what_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    run.main(f"--models realnvp --threads 1 --rounds 2 --seconds 0.001 --out {path}".split())
    content = json.loads(path.read_text(encoding="utf-8"))
    verify(content)
    assert content["threads"] == 1 and content["rounds"] == 2
    assert f"{OURS}, {run.NETWORKS}" in content["models"]["realnvp"]["milliseconds"][run.STEP]
    assert run.table(content) in capsys.readouterr().out


def test_a_missed_bar_is_said() -> None:
    def steps(model: str, **medians: float) -> dict[str, Any]:
        entries = {name.replace("_", " "): {"median": median} for name, median in medians.items()}
        entries[OURS] = entries.pop("ours")
        entries[f"{OURS}, {run.NETWORKS}"] = entries.pop("networks")
        return {model: {"milliseconds": {run.STEP: entries}}}

    def verdicts(*results: dict[str, Any]) -> list[bool | None]:
        found = run.bars({name: result for one in results for name, result in one.items()})
        return [bar["met"] for bar in found]

    glow = steps("glow", ours=1.0, networks=0.9, normflows=1.5, nflows=1.2)
    assert verdicts(glow) == [True, True, None, None] and run.bars(glow)[0]["to"] == "nflows"
    missed = steps("glow", ours=1.0, networks=0.8, normflows=1.5, nflows=1.1)
    assert verdicts(missed) == [False, False, None, None]
    realnvp = steps("realnvp", ours=1.0, networks=0.1, normflows=1.5, nflows=1.01)
    nice = steps("nice", ours=1.0, networks=0.9, normflows=0.99, nflows=1.1)
    assert verdicts(glow, realnvp, nice) == [True, True, True, False]
    assert verdicts() == [None] * 4


@pytest.mark.parametrize("size", [{"side": 8}, {"steps": 4}, {"hidden": 64}], ids=str)
def test_multiply_adds_on_paper_are_those_that_pytorch_counts(size: dict[str, int]) -> None:
    ((name, value),) = size.items()
    step = scaling.step_of(name, value)
    with FlopCounterMode(display=False) as counter:
        step()
    counted = (
        counter.get_total_flops() / 2
    )  # a multiply-add is two operations; the layers' parameters cost some as well
    expected = 3 * scaling.BATCH * scaling.multiply_adds(**scaling.sizes(name, value))
    assert counted == pytest.approx(expected, rel=0.05)


def test_an_exponent_is_the_slope_of_the_last_points() -> None:
    assert scaling.exponent([1, 2, 4, 8, 16], [7, 7, 3 * 4**1.5, 3 * 8**1.5, 3 * 16**1.5]) == pytest.approx(1.5)


def test_the_stored_scaling_follows_from_its_rounds() -> None:
    content = json.loads((ROOT / "benchmarks" / "scaling.json").read_text(encoding="utf-8"))
    assert {"commit", "torch", "python", "hardware", "processor"} <= content.keys()
    assert content["batch"] == scaling.BATCH and content["rounds"] >= 7
    found = {
        f"{name} {point['value']}": point["rounds"]
        for name, sweep in content["sweeps"].items()
        for point in sweep["points"]
    }
    assert all(len(rounds) == content["rounds"] and min(rounds) > 0 for rounds in found.values())
    assert content["sweeps"] == json.loads(json.dumps(scaling.sweeps(found)))
    assert f"exponent of the last {scaling.UPPER}: 2.00 expected" in scaling.table(content)


def test_the_other_libraries_are_pinned_apart() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {r.name: r for r in map(Requirement, project["optional-dependencies"]["bench"])}
    text = (ROOT / "benchmarks" / "requirements.lock").read_text(encoding="utf-8")
    pins = [Requirement(line.rstrip(" \\")) for line in text.splitlines() if line[:1].isalnum()]
    assert {pin.name for pin in pins} == set(wanted)
    for pin in pins:
        assert wanted[pin.name].specifier.contains(str(pin.specifier).removeprefix("=="))
        assert f"\n{pin.name}==" not in "\n" + (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert text.count("--hash=sha256:") >= len(pins) and "://" not in text and "--index" not in text
