"""The stored experiments: written by a clean checkout, and told truly on the pages that show them."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from nflows_lib import ablations, runs

CHAPTERS = runs.ROOT / "chapters"


def printed(chapter: str) -> str:
    """All that the cells of a chapter print."""
    cells = json.loads((CHAPTERS / chapter).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_is_stored_with_its_origin(name):
    record, ablation = ablations.load(name), ablations.find(name)
    assert record.keys() >= {"question", "command", "commit", "python", "torch", "hardware", "seeds", "minutes"}
    assert record["ablation"] == name
    assert not record["commit"].endswith("-dirty")
    assert record["seeds"] == list(ablation.seeds)
    assert list(record["results"]) == list(ablation.arms)
    assert all(len(results) == len(ablation.seeds) for results in record["results"].values())


def test_all_of_them_take_at_most_30_minutes():
    assert sum(ablations.load(name)["minutes"] for name in ablations.ABLATIONS) < 30


def test_the_table_of_q1_on_the_page_follows_from_the_file():
    record = json.loads((runs.ROOT / "data" / "ablations" / "nice-activation.json").read_text())
    page = printed("01_nice.ipynb")
    for arm, results in record["results"].items():
        bits = [result["bits_per_dim"] for result in results]
        assert len(bits) == 3
        line = f"{arm:>10}  {statistics.mean(bits):.3f} ± {statistics.stdev(bits):.3f} bits/dim\n"
        assert line in page


@pytest.mark.parametrize("name", [name for name in ablations.ABLATIONS if name.startswith("realnvp-")])
def test_the_tables_of_chapter_3_follow_from_the_files(name):
    record = json.loads((runs.ROOT / "data" / "ablations" / f"{name}.json").read_text())
    page = printed("03_realnvp.ipynb")
    width = max(map(len, record["results"]))
    for arm, results in record["results"].items():
        bits = [result["test"] for result in results]
        assert len(bits) == 3
        assert f"{arm:>{width}}  {statistics.mean(bits):.3f} ± {statistics.stdev(bits):.3f} bits/dim\n" in page


def test_weights_lose_their_norm_and_nothing_else():
    torch.manual_seed(0)
    network, x = ablations.resnet(), torch.randn(2, 1, 8, 8)
    before = network(x)
    ordinary = ablations.without_weight_norm(network)
    assert not [name for name, _ in ordinary.named_parameters() if "original" in name]
    torch.testing.assert_close(ordinary(x), before)


@pytest.mark.parametrize("steps", [{}, *ablations.REFERENCE_STEPS.values(), {"batch_norm": False}], ids=str)
def test_the_source_s_first_network_and_each_step_from_it(steps):
    torch.manual_seed(0)
    network = ablations.PlainResNet(4, 2, **steps)
    kinds = [type(module) for module in network.modules()]
    convolutions = steps.get("convolutions", 3) * 2 + 2 + (3 if steps.get("skips") else 0)
    assert kinds.count(torch.nn.Conv2d) + sum("Parametrized" in kind.__name__ for kind in kinds) == convolutions
    assert kinds.count(torch.nn.BatchNorm2d) == (4 if steps.get("batch_norm", True) else 0)
    assert any("Parametrized" in kind.__name__ for kind in kinds) == steps.get("weight_norm", False)
    output = network(torch.randn(3, 1, 8, 8))
    assert output.shape == (3, 2, 8, 8)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_long_run_of_f6_on_the_page_is_that_of_the_file():
    record = json.loads((runs.ROOT / "data" / "ablations" / "no-dequantization.json").read_text())
    left_out = record["results"]["left out"][0]
    assert f"left out: {left_out['broke_with']} at step {left_out['broke_at']:,}\n" in printed(
        "02_dequantization.ipynb"
    )
    assert len(left_out["log_p"]) == math.ceil(left_out["steps"] / 200)


def test_an_arm_repeats_and_its_seed_matters():
    first, again, other = (ablations.no_dequantization(True, seed, steps=3, every=1) for seed in (0, 0, 1))
    assert first == again
    assert first["log_p"] != other["log_p"]


def test_the_arm_without_noise_breaks_and_says_where(monkeypatch):
    """With a learning rate a hundred times as high the end comes a hundred times as soon."""
    fit = ablations.fit
    monkeypatch.setattr(ablations, "fit", lambda *a, **options: fit(*a, **{**options, "lr": 0.5}))
    left_out = ablations.no_dequantization(False, 0, steps=400, every=50)
    assert left_out["broke_at"] == left_out["steps"] + 1 < 400
    assert left_out["broke_with"] in ("nan", "inf")


def test_run_stores_what_the_arms_return(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    small = ablations.Ablation("Which?", (3, 4), {"a": lambda seed: {"x": seed}, "b": lambda seed: {"x": 2 * seed}})
    monkeypatch.setitem(ablations.ABLATIONS, "small", small)
    ablations.run("small")
    record = ablations.load("small")
    assert record["results"] == {"a": [{"x": 3}, {"x": 4}], "b": [{"x": 6}, {"x": 8}]}
    assert record["command"] == "python -m nflows_lib.ablations small"
    assert record["torch"] == torch.__version__
    table = ablations.mean_and_spread(record, "x")
    assert table["b"] == (pytest.approx(7.0), pytest.approx(math.sqrt(2)))


def test_an_unknown_ablation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ablation: expected one of nice-activation, .*, got 'none'"):
        ablations.load("none")
