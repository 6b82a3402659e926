"""Tests of the experiment behind chapter 7: what its flows are, and that the chapter shows its record correctly."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from nflows_lib.coupling import BoundedGlowCoupling
from nflows_lib.experiments import archive
from nflows_lib.experiments.ablations import mixture
from nflows_lib.experiments.ablations.mixture import FLOWS, AttentionNet, after_glow
from nflows_lib.experiments.mixture import MixtureCoupling
from nflows_lib.networks import GlowNet

NAMES = {
    "Glow": "Glow",
    "mixture, last": "one mixture per scale",
    "mixture, all": "mixtures everywhere",
    "attention": "attention",
}


def printed() -> list[str]:
    """The lines that the cells of chapter 7 print."""
    page = json.loads((archive.ROOT / "chapters" / "07_after_glow.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs).splitlines()


def test_the_tables_of_chapter_7_follow_from_the_file():
    results = json.loads((archive.ROOT / "data" / "ablations" / "after-glow.json").read_text())["results"]
    lines = [" ".join(line.split()) for line in printed()]
    glow = {budget: [run["test"] for run in results["Glow" + budget]] for budget in ("", ", 400 updates")}
    for kind, name in NAMES.items():
        for budget, title in (("", "20 seconds"), (", 400 updates", "400 updates")):
            test = [run["test"] for run in results[kind + budget]]
            assert f"{name}, {title} {statistics.mean(test):.3f} ± {statistics.stdev(test):.3f}" in lines
            if kind != "Glow":
                ahead = " ".join(f"{other - own:+.3f}" for other, own in zip(glow[budget], test, strict=True))
                assert f"{title}, {name}: {ahead}" in lines
        mean = {
            measure: statistics.mean(run[measure] for run in results[kind])
            for measure in ("parameters", "updates", "grid", "broken", "sampling")
        }
        slower = mean["sampling"] / statistics.mean(run["sampling"] for run in results["Glow"])
        counts = f"{mean['parameters']:,.0f} {mean['updates']:,.0f}"
        assert f"{name} {counts} {mean['grid']:.2f} {mean['broken']:.0%} {slower:.1f} × Glow's" in lines


def test_the_four_flows_have_as_many_parameters_within_5_percent():
    counts = {kind: sum(p.numel() for p in make().parameters()) for kind, make in FLOWS.items()}
    assert max(counts.values()) < 1.05 * min(counts.values())


def test_the_four_flows_are_what_their_names_say():
    found = {}
    for kind, make in FLOWS.items():
        couplings = [m for m in make().modules() if isinstance(m, BoundedGlowCoupling | MixtureCoupling)]
        found[kind] = {(type(c), type(c.network)): 0 for c in couplings}
        for c in couplings:
            found[kind][type(c), type(c.network)] += 1
    assert found == {
        "Glow": {(BoundedGlowCoupling, GlowNet): 8},
        "mixture, last": {(BoundedGlowCoupling, GlowNet): 6, (MixtureCoupling, GlowNet): 2},
        "mixture, all": {(MixtureCoupling, GlowNet): 8},
        "attention": {(BoundedGlowCoupling, AttentionNet): 8},
    }


def test_attention_starts_at_zero_and_sees_every_pixel():
    torch.manual_seed(0)
    network, x = AttentionNet(3, 6, 16, width=8), torch.randn(2, 3, 4, 4)
    assert torch.equal(network(x), torch.zeros(2, 6, 4, 4))
    torch.nn.init.normal_(network.last.weight)
    before = network(x)
    x[0, :, 3, 3] += 1
    moved = (network(x) - before).abs().amax(1) > 1e-6
    assert moved[0].all() and not moved[1].any()


def test_time_becomes_updates_and_an_arm_repeats(monkeypatch):
    """Three updates have time at half a second each; the timing does not change what is trained."""
    monkeypatch.setattr(mixture, "grid_of_samples", lambda flow: (1.0, 0.0))
    given = after_glow(0, kind="mixture, last", updates=3)
    monkeypatch.setattr(mixture, "seconds_per_update", lambda flow, train: torch.rand(()).item() * 0 + 0.5)
    timed = after_glow(0, kind="mixture, last", seconds=1.5)
    assert timed["updates"] == 3
    assert timed["test"] == given["test"]
    assert after_glow(1, kind="mixture, last", updates=3)["test"] != given["test"]


def test_timing_leaves_the_flow_as_it_is():
    torch.manual_seed(0)
    flow = FLOWS["Glow"]()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    train = torch.randint(256, (64, 3, 16, 16))
    assert mixture.seconds_per_update(flow, train, updates=1) > 0
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("kind", FLOWS)
def test_every_arm_of_the_record_ran_its_flow(kind):
    results = json.loads((archive.ROOT / "data" / "ablations" / "after-glow.json").read_text())["results"]
    expected = sum(parameter.numel() for parameter in FLOWS[kind]().parameters())
    assert {run["parameters"] for run in results[kind] + results[f"{kind}, 400 updates"]} == {expected}
