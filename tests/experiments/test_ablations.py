"""Tests of the ablations: a clean checkout wrote the records, and the pages show them correctly."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nflows_lib import data
from nflows_lib.bijection import Bijection
from nflows_lib.conditional import ConditionalNet, ConditioningNetwork
from nflows_lib.convolution import ChannelPermutation, Invertible1x1Conv
from nflows_lib.coupling import AffineCoupling, BoundedGlowCoupling, GlowCoupling
from nflows_lib.dequantization import UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import ablations, archive
from nflows_lib.flow import Flow
from nflows_lib.models import cglow, glow
from nflows_lib.multiscale import FactorOut, Squeeze
from nflows_lib.networks import MLP
from nflows_lib.normalization import ActNorm

CHAPTERS = archive.ROOT / "chapters"


def printed(chapter: str) -> str:
    """Everything that the cells of a chapter print."""
    cells = json.loads((CHAPTERS / chapter).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


def stored(name: str) -> dict[str, Any]:
    """The record of an ablation, read without the library."""
    return json.loads((archive.ROOT / "data" / "ablations" / f"{name}.json").read_text())


def over_seeds(values: list[float]) -> str:
    """The mean and the standard deviation, as a table of a page prints them."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_is_stored_with_its_origin(name):
    record, ablation = ablations.load(name), ablations.find(name)
    assert record.keys() >= {"question", "command", "commit", "python", "torch", "hardware", "seeds", "minutes"}
    assert record["ablation"] == name
    assert not record["commit"].endswith("-dirty")
    assert record["seeds"] == list(ablation.seeds)
    assert list(record["results"]) == list(ablation.arms)
    assert all(len(results) == len(ablation.seeds) for results in record["results"].values())


def test_each_takes_at_most_ten_minutes_and_two_at_a_time_take_half_an_hour():
    minutes = [ablations.load(name)["minutes"] for name in ablations.ABLATIONS]
    assert max(minutes) < 10
    assert sum(minutes) / 2 < 30


# For each open question: the columns of its table, and the name of each row by the variant's key in the file.
QUESTIONS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "nice-activation": (
        {"bits_per_dim": "test bits/dim"},
        {"ReLU": "ReLU", "Leaky 0.01": "LeakyReLU, slope 0.01", "Leaky 0.2": "LeakyReLU, slope 0.2"},
    ),
    "realnvp-alpha": (
        {"test": "test bits/dim"},
        {"0.05": "margin 0.05", "0.01": "margin 0.01", "1e-05": "margin 0.00001"},
    ),
    "realnvp-weight-norm": (
        {"test": "test bits/dim"},
        {
            f"{key}, rate {rate}": f"{name}, rate {rate}"
            for rate in ("0.003", "0.01")
            for key, name in (("with", "weight norm"), ("without", "ordinary weights"))
        },
    ),
    "realnvp-resnet": (
        {"test": "test bits/dim"},
        {
            "the source's first": "the notes' first",
            "+ weight norm": "+ weight norm",
            "+ [h, -h] and a ReLU": "+ [a, -a] and a ReLU",
            "+ skips to the output": "+ skips to the output",
            "+ 2 convolutions a block": "+ 2 convolutions per block, not 3",
            "the reference's": "all four, as in the reference",
            "- batch norm inside": "the notes' first, no batch norm",
        },
    ),
    "realnvp-clipping": (
        {"test": "test bits/dim"},
        {
            f"{norm}, {key}": f"{norm}: {name}"
            for norm in ("no batch norm", "batch norm")
            for key, name in (
                ("not clipped", "unclipped"),
                ("clipped at 1", "clipped at 1"),
                ("short memory", "unclipped, short memory"),
            )
        },
    ),
    "realnvp-dequantization": (
        {"test": "bound, bits/dim", "log_mean_exp": "importance-weighted"},
        {"uniform": "uniform noise", "learned": "learned noise"},
    ),
    "glow-depth": (
        {"test": "test bits/dim", "grid": "grid", "broken": "share not finite"},
        {
            "1": "1 step",
            "2": "2 steps",
            "4": "4 steps",
            "8": "8 steps",
            "1, 1600 updates": "1 step, 1,600 updates",
            "4, 1600 updates": "4 steps, 1,600 updates",
            "2, wide": "2 steps, wide networks",
            "8, bounded": "8 steps, bounded scale",
        },
    ),
    "glow-grid": (
        {"test": "test bits/dim", "grid": "grid", "fine": "2×2 borders", "coarse": "4×4 borders"},
        {
            "Glow": "Glow",
            "deep prior": "deep prior",
            "Haar": "Haar squeeze",
            "reflected": "reflection",
            "couplings before": "couplings first",
            "shifted": "shifted squares",
            "shifted, 800 updates": "shifted, 800 updates",
        },
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_tables_of_the_open_questions_follow_from_the_files(name):
    """The whole table of a record: its origin, its columns in order, a row for every variant in order, and no other."""
    record = stored(name)
    measures, variants = QUESTIONS[name]
    assert list(variants) == list(record["results"])
    table = [
        record["command"],
        f"commit {record['commit']}, {record['hardware']}",
        "mean ± standard deviation over 3 seeds",
        " ".join(measures.values()),
    ]
    for key, row in variants.items():
        results = record["results"][key]
        assert len(results) == 3
        columns = ([result[measure] for result in results] for measure in measures)
        cells = " ".join(over_seeds(values) for values in columns)
        table.append(f"{row} {cells}")
    lines = [" ".join(line.split()) for line in printed("open_questions.ipynb").splitlines()]
    start = lines.index(record["command"])
    assert lines[start : start + len(table)] == table


def test_the_differences_that_the_open_questions_print_follow_from_the_files():
    page = printed("open_questions.ipynb")

    def mean(name: str, variant: str, measure: str = "test") -> float:
        return statistics.mean(result[measure] for result in stored(name)["results"][variant])

    unclipped = mean("realnvp-clipping", "no batch norm, not clipped")
    for words, key in (("clipping improves the score", "clipped at 1"), ("a short memory", "short memory")):
        assert f"{words} by {unclipped - mean('realnvp-clipping', f'no batch norm, {key}'):.3f}" in page
    noise = mean("realnvp-dequantization", "uniform") - mean("realnvp-dequantization", "learned")
    assert f"learned noise scores {noise:.3f} bits/dim better\n" in page
    deeper, wider = (mean("glow-depth", "2") - mean("glow-depth", key) for key in ("8", "2, wide"))
    assert f"better than 2 steps: 8 steps by {deeper:.2f} bits/dim, width by {wider:.2f}\n" in page
    runs = stored("realnvp-alpha")["results"]["0.05"]
    rows = [line.split()[-3:] for line in page.splitlines() if "≈" in line and " to " in line]
    assert rows == [[f"{run['training'][block]:.3f}" for run in runs] for block in range(3)]


def test_the_differences_between_pixels_that_the_open_questions_print_follow_from_the_file():
    """Per variant: levels inside squares and at both kinds of borders, the grid at temperature 0.7, and the score."""
    lines = [" ".join(line.split()) for line in printed("open_questions.ipynb").splitlines()]
    results, names = stored("glow-grid")["results"], QUESTIONS["glow-grid"][1]
    score = {key: statistics.mean(run["test"] for run in runs) for key, runs in results.items()}
    for key, name in names.items():
        row = [
            statistics.mean(difference for run in results[key] for difference in run["steps"][first::period])
            for first, period in ((0, 2), (1, 4), (3, 4))
        ]
        row.append(statistics.mean(run["cold"] for run in results[key]))
        assert f"{name} {' '.join(f'{value:.1f}' for value in row)}" in lines
    changes = list(names)[2:6]
    gains = ", ".join(f"{names[key]} {score['Glow'] - score[key]:+.2f}" for key in changes)
    assert lines[lines.index("gain over Glow in bits/dim (negative: worse):") + 1] == gains
    shares = []
    for run in results["Glow"]:
        fine, coarse = 4 * (run["fine"] - 1), 3 * (run["coarse"] - 1)
        shares.append(f"{coarse / (fine + coarse):.0%}")
        assert run["grid"] == pytest.approx(1 + (fine + coarse) / 7, rel=1e-3)
    assert f"Glow, share of the grid that lies at 4×4 borders, by seed: {', '.join(shares)}" in lines


def test_the_samples_without_a_tanh_on_the_page_are_those_of_the_file():
    record = stored("realnvp-tanh")
    page = printed("03_realnvp.ipynb")
    assert f"{record['command']}\ncommit {record['commit']}, {record['hardware']}\n" in page
    for variant, results in record["results"].items():
        row = " ".join(f"{result['largest']:.0e}" for result in results)
        assert f"{variant:>11}: {row}\n" in page


def test_the_gap_of_the_moons_on_the_page_is_that_of_the_file():
    record = stored("realnvp-moons")
    page = printed("03_realnvp.ipynb")
    assert f"{record['command']}\ncommit {record['commit']}, {record['hardware']}\n" in page
    for variant, results in record["results"].items():
        gaps = [result["gap"] for result in results]
        assert f"{variant:>11}  {over_seeds(gaps)}\n" in page


def test_what_clipping_gains_on_the_page_follows_from_the_file():
    record = stored("realnvp-clipping")
    page = printed("03_realnvp.ipynb")
    assert f"{record['command']}\ncommit {record['commit']}, {record['hardware']}\n" in page

    def tests(variant):
        return [result["test"] for result in record["results"][variant]]

    for norm in ("no batch norm", "batch norm"):
        gains = [
            free - clipped
            for free, clipped in zip(tests(f"{norm}, not clipped"), tests(f"{norm}, clipped at 1"), strict=True)
        ]
        nats, bits = 64 * math.log(2) * statistics.mean(gains), statistics.mean(gains)
        assert f"\n{norm}: clipping gains {nats:.1f} nats, {bits:.3f} bits/dim, mean of three seeds\n" in page
        by_seed = " ".join(f"{64 * math.log(2) * gain:.1f}" for gain in gains)
        assert f"\n    seed by seed: {by_seed} nats\n" in page
    gradients = [result["gradient"] for result in record["results"]["no batch norm, not clipped"]]
    first = [round(each[0]) for each in gradients]
    usual = [round(statistics.median(each)) for each in gradients]
    assert f"the longest of the first ten: {first}\n" in page
    assert f"the median of the longest of each ten: {usual}\n" in page


def test_the_table_of_f5_on_the_page_follows_from_the_file():
    record = stored("nice-initialisation")
    page = printed("01_nice.ipynb")
    for arm, results in record["results"].items():
        columns = [[result["first"] for result in results], [result["loss"][9] for result in results]]
        if len(results[0]["loss"]) == 25:
            columns.append([result["loss"][24] for result in results])
        row = [f"{statistics.mean(column):6.1f} ± {statistics.stdev(column):3.1f}" for column in columns]
        assert "   ".join([f"{arm:18}", *row]) + "\n" in page


def test_the_table_of_f8_on_the_page_follows_from_the_file():
    record = stored("nice-shared-noise")
    page = printed("02_dequantization.ipynb")
    headings = {"training": "training bits/dim", "test": "test bits/dim, fresh noise"}
    assert f"           {'  '.join(headings.values())}\n" in page
    for arm, results in record["results"].items():
        row = f"{arm:>9}"
        for measure, heading in headings.items():
            values = [result[measure] for result in results]
            cell = over_seeds(values)
            row += f"  {cell:>{len(heading)}}"
        assert f"\n{row}\n" in page


def test_log_scales_start_where_the_arm_says():
    """From log-scales at 0 the first loss hardly depends on the seed, from random ones it does; the variant repeats."""
    zeros, other = (ablations.nice.nice_initialisation(False, 0.01, 2, seed)["first"] for seed in (0, 1))
    assert zeros == pytest.approx(other, abs=0.5)
    first, again, other = (ablations.nice.nice_initialisation(True, 0.01, 2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["first"] != pytest.approx(zeros, abs=0.5)
    assert first["first"] != pytest.approx(other["first"], abs=0.5)


@pytest.mark.parametrize("fixed", [False, True])
def test_shared_noise_is_one_vector_for_a_batch_or_for_the_run(fixed):
    torch.manual_seed(0)
    layer, images = ablations.nice.SharedNoise(4, 8, fixed), torch.randint(4, (5, 8))
    first, again = (layer(images)[0] - images for _ in range(2))
    torch.testing.assert_close(first, first[:1].expand(5, 8))
    assert torch.allclose(first, again) == fixed
    assert torch.equal(layer.inverse(layer(images)[0]), images)


def test_an_arm_of_shared_noise_repeats_and_differs_from_the_others():
    ways = (None, "batch", "run", "run")
    fresh, batch, run, again = (ablations.nice.nice_shared_noise(shared, 0, steps=2) for shared in ways)
    assert run == again
    assert len({result["test"] for result in (fresh, batch, run)}) == 3


def test_weights_lose_their_norm_and_nothing_else():
    torch.manual_seed(0)
    network, x = ablations.realnvp.resnet(), torch.randn(2, 1, 8, 8)
    before = network(x)
    ordinary = ablations.realnvp.without_weight_norm(network)
    assert not [name for name, _ in ordinary.named_parameters() if "original" in name]
    torch.testing.assert_close(ordinary(x), before)


@pytest.mark.parametrize("steps", [{}, *ablations.realnvp.REFERENCE_STEPS.values(), {"batch_norm": False}], ids=str)
def test_the_source_s_first_network_and_each_step_from_it(steps):
    torch.manual_seed(0)
    network = ablations.realnvp.PlainResNet(4, 2, **steps)
    kinds = [type(module) for module in network.modules()]
    convolutions = steps.get("convolutions", 3) * 2 + 2 + (3 if steps.get("skips") else 0)
    assert kinds.count(torch.nn.Conv2d) + sum("Parametrized" in kind.__name__ for kind in kinds) == convolutions
    assert kinds.count(torch.nn.BatchNorm2d) == (4 if steps.get("batch_norm", True) else 0)
    assert any("Parametrized" in kind.__name__ for kind in kinds) == steps.get("weight_norm", False)
    output = network(torch.randn(3, 1, 8, 8))
    assert output.shape == (3, 2, 8, 8)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_an_unbounded_coupling_is_the_affine_one_without_its_tanh():
    torch.manual_seed(0)
    network = MLP(1, 2, hidden=8, depth=1)
    nn.init.normal_(network.layers[-1].weight)
    bounded, unbounded = (
        kind(torch.tensor([True, False]), network) for kind in (AffineCoupling, ablations.realnvp._Unbounded)
    )
    x = torch.randn(50, 2)
    (z, log_det), (_, raw) = bounded(x), unbounded(x)
    torch.testing.assert_close(raw.tanh(), log_det)
    torch.testing.assert_close(unbounded.inverse(unbounded(x)[0]), x)
    assert not torch.allclose(z, unbounded(x)[0])


def test_an_arm_on_points_repeats_and_its_seed_matters():
    for arm, options in (
        (ablations.realnvp.sine_samples, {"coupling": ablations.realnvp._Unbounded, "steps": 3, "draws": 100}),
        (ablations.realnvp.moons_gap, {"steps": 3}),
    ):
        first, again, other = (arm(seed, **options) for seed in (0, 0, 1))
        assert first == again
        assert first != other


def test_the_tables_of_chapter_4_follow_from_the_files():
    page = printed("04_multiscale.ipynb")
    for name in ("multiscale-squeeze", "multiscale-scales"):
        record = stored(name)
        width = max(map(len, record["results"]))
        for arm, results in record["results"].items():
            bits = [result["test"] for result in results]
            assert len(bits) == 3
            assert f"\n{arm:>{width}}  {over_seeds(bits)}\n" in page


def test_the_tables_of_chapter_5_follow_from_the_files():
    page = printed("05_glow.ipynb")
    tables = [
        (
            "glow-first-updates",
            ("start", "test"),
            {"as it is": "first batch: patches", "from noise": "first batch: noise"},
        ),
        (
            "glow-first-updates",
            ("start", "test"),
            {"as it is": "sigmoid, zeros", "no zeros": "sigmoid, no zeros", "exp(h)": "exp, zeros"},
        ),
        ("glow-first-updates", ("test",), {"checkerboard": "checkerboard", "channel mask": "channel mask"}),
        ("glow-mixing", ("test",), {name: name for name in ablations.glow.MIXERS}),
        ("glow-depth", ("test", "broken"), {"8": "Glow's factor", "8, bounded": "bounded factor"}),
    ]
    for name, measures, variants in tables:
        results = stored(name)["results"]
        for variant, label in variants.items():
            assert len(results[variant]) == 3
            columns = [[run[measure] for run in results[variant]] for measure in measures]
            cells = [over_seeds(values) for values in columns]
            rows = [line.split("  ") for line in page.splitlines() if line.strip().startswith(label)]
            assert [label, *cells] in [[cell.strip() for cell in row if cell.strip()] for row in rows]
    results = stored("glow-first-updates")["results"]
    stopped = " ".join(str(run["updates"]) for run in results["exp(h), no zeros"])
    assert f"exp, no zeros: not finite at update {stopped}\n" in page


def test_the_tables_of_chapter_6_follow_from_the_file():
    results = stored("cglow-conditioning")["results"]
    page = printed("06_cglow.ipynb")
    nats = {arm: [run["test"] * 32 * math.log(2) for run in runs] for arm, runs in results.items()}
    for arm in ("all three", "couplings only", "ActNorm and W only"):
        gains = [none - some for none, some in zip(nats["none"], nats[arm], strict=True)]
        line = f"{arm:>18}: {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f} nats over the blind flow\n"
        assert line in page
    by_seed = " ".join(f"{run['margin']:.0f}" for run in results["all three"])
    assert f"context advantage of all three, by seed: {by_seed} nats\n" in page
    measures = {
        "bits/dim": "test",
        "bits/dim, importance-weighted": "test_closer",
        "correlation of neighbours": "neighbours",
        "ink: error / deviation": "ink_ratio",
        "ink: coverage, 0.784 is due": "ink_covered",
    }
    for row, measure in measures.items():
        cells = ""
        for arm in ("all three", "independent pixels"):
            values = [run[measure] for run in results[arm]]
            cells += f"{statistics.mean(values):7.3f} ± {statistics.stdev(values):.3f}"
        assert f"\n{row:30}{cells}\n" in page
    cells = ""
    for arm in ("all three", "independent pixels"):  # of 100 draws, as printed: (E^2 + V, E^2 + V / 100)
        pairs = [(run["rms"]["1"] ** 2, run["rms"]["100"] ** 2) for run in results[arm]]
        variances = [(one - many) / 0.99 for one, many in pairs]
        values = [math.sqrt((one - v) / v) for (one, _), v in zip(pairs, variances, strict=True)]
        cells += f"{statistics.mean(values):7.3f} ± {statistics.stdev(values):.3f}"
    assert f"\n{'pixel: error / deviation':30}{cells}\n" in page


def test_the_table_of_the_horses_follows_from_the_files():
    page = printed("06_cglow.ipynb")
    measures = {
        "bits/dim": ("figure", "bits_per_dim"),
        "bits/dim, importance-weighted": ("measured", "bits_per_dim_most"),
        "IoU": ("measured", "iou_most"),
        "coverage, 0.784 is due": ("measured", "area_covered"),
        "calibration error": ("measured", "calibration_error"),
    }
    for row, (part, measure) in measures.items():
        cells = ""
        for run in ("cglow-horses-small", "unet-horses-small", "unet-horses-early"):
            files = sorted((archive.ROOT / "data" / "pretrained" / run).glob("run*.json"))
            values = [json.loads(file.read_text())[part][measure] for file in files]
            assert len(values) == 3
            cells += f"{statistics.mean(values):7.3f} ± {statistics.stdev(values):.3f}"
        assert f"\n{row:29}{cells}\n" in page
    measured = {}
    for run in ("cglow-horses-small", "unet-horses-small", "unet-horses-early"):
        files = sorted((archive.ROOT / "data" / "pretrained" / run).glob("run*.json"))
        measured[run] = [json.loads(file.read_text())["measured"] for file in files]
    rows = {"one draw": "iou_one", "mean of 10 draws": "iou", "mean of 10 at temperature 0.5": "iou_cold"}
    for row, key in rows.items():
        values = [seed[key] for seed in measured["cglow-horses-small"]]
        assert f"\nc-Glow's IoU, {row}: {over_seeds(values)}\n" in page
    shares = [statistics.mean(seed["area_covered"] for seed in seeds) for seeds in measured.values()]
    errors = ", ".join(f"{math.sqrt(share * (1 - share) / 51):.2f}" for share in shares)
    assert f"\nof a coverage: {errors}\n" in page


def test_the_long_run_of_f6_on_the_page_is_that_of_the_file():
    record = stored("no-dequantization")
    left_out = record["results"]["left out"][0]
    assert f"without noise: {left_out['broke_with']} at step {left_out['broke_at']:,}\n" in printed(
        "02_dequantization.ipynb"
    )
    assert len(left_out["log_p"]) == math.ceil(left_out["steps"] / 200)


def test_an_arm_repeats_and_its_seed_matters():
    first, again, other = (ablations.nice.no_dequantization(True, seed, steps=3, every=1) for seed in (0, 0, 1))
    assert first == again
    assert first["log_p"] != other["log_p"]


def test_the_arm_without_noise_breaks_and_says_where():
    """With a learning rate five hundred times as high the training breaks within 400 steps."""
    left_out = ablations.nice.no_dequantization(False, 0, steps=400, every=50, lr=0.5)
    assert left_out["broke_at"] == left_out["steps"] + 1 < 400
    assert left_out["broke_with"] in ("nan", "inf")


# --- what mixes Glow's channels, how deep a scale is ------------------------------------------------------------------


def kinds(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.modules()]


def test_replace_reaches_into_a_factor_out_and_keeps_the_order():
    flow = glow((1, 8, 8), scales=3, steps=2, hidden=2)
    before, seen = kinds(flow), []

    def make(layer: nn.Module) -> nn.Module:
        seen.append(layer)
        return ChannelPermutation(torch.arange(layer.channels))

    old = [layer for layer in flow.modules() if isinstance(layer, Invertible1x1Conv)]
    ablations.glow.replace(flow, Invertible1x1Conv, make)
    assert kinds(flow) == ["ChannelPermutation" if kind == "Invertible1x1Conv" else kind for kind in before]
    assert len(old) == len(seen) == 6
    assert {id(layer) for layer in old} == {id(layer) for layer in seen}
    inside = flow.chain[-1].inner[-1].inner
    assert isinstance(flow.chain[-1], FactorOut)
    assert [type(layer) for layer in inside][1:4] == [ActNorm, ChannelPermutation, GlowCoupling]
    assert inside[2].channels == 16


def test_replace_takes_the_exact_type_only():
    """A derived layer stays, a new layer is not replaced again, and layers inside a replaced one are reached."""

    class Derived(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(1, 1), Derived(1, 1), nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1))}))
    derived = module[1]
    ablations.glow.replace(module, nn.Linear, lambda layer: Derived(1, 1))
    assert kinds(module) == ["Sequential", "Derived", "Derived", "ModuleDict", "Sequential", "Derived"]
    assert module[1] is derived
    made = []
    ablations.glow.replace(module, Derived, lambda layer: made.append(layer) or nn.Sequential(Derived(1, 1)))
    assert len(made) == 3
    nested = nn.Sequential(GlowCoupling(4, nn.Sequential(GlowCoupling(2, nn.Identity()))))
    ablations.glow.replace(nested, GlowCoupling, lambda layer: BoundedGlowCoupling(layer.channels, layer.network))
    assert kinds(nested).count("BoundedGlowCoupling") == 2
    assert "GlowCoupling" not in kinds(nested)


def test_grid_texture_by_hand():
    """Rows 0 1 5 7 step by 1 and 2 inside squares and by 4 across; columns by 3 and 0 inside and by 1 across."""
    row = torch.tensor([0, 1, 5, 7])
    image = row + torch.tensor([0, 3, 4, 4])[:, None]
    inside, across = (1 + 2) / 2 + (3 + 0) / 2, 4 + 1
    for images in (image[None, None], image.byte().repeat(3, 2, 1, 1), image.double()[None, None], -image[None, None]):
        assert ablations.glow.grid_texture(images) == pytest.approx(across / inside)
    assert isinstance(ablations.glow.grid_texture(image[None, None]), float)


def test_grid_texture_is_1_of_noise():
    """The 2 x 500 x 3 x 16 x 8 steps inside have a coefficient of variation below 1; two may share a value."""
    torch.manual_seed(0)
    images = torch.randint(256, (500, 3, 16, 16))
    error = 2 / math.sqrt(2 * 500 * 3 * 16 * 7)
    assert abs(ablations.glow.grid_texture(images) - 1) < 5 * error
    assert abs(ablations.glow.grid_texture(images.float() ** 2) - 1) < 10 * error


def squares(n: int, noise: float, size: int = 8) -> Tensor:
    """Images of constant 2x2 squares with random values, and a little noise."""
    values = torch.randn(n, 3, size, size).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return values + noise * torch.randn(n, 3, 2 * size, 2 * size)


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_grid_texture_of_squares_is_known(noise):
    """Steps inside are N(0, 2 noise^2), steps across N(0, 2 + 2 noise^2); the texture is the ratio of mean sizes."""
    torch.manual_seed(0)
    expected = math.sqrt(1 + noise**-2)
    assert ablations.glow.grid_texture(squares(300, noise)) == pytest.approx(expected, rel=0.03)
    shifted = squares(300, noise).roll((1, 1), (2, 3))  # the borders lie where squares should be
    assert ablations.glow.grid_texture(shifted[..., 2:14, 2:14]) == pytest.approx(1 / expected, rel=0.03)


def test_grid_texture_does_not_tell_rows_from_columns():
    torch.manual_seed(0)
    x = squares(4, 0.3) * torch.linspace(1, 3, 16)
    assert ablations.glow.grid_texture(x) == pytest.approx(ablations.glow.grid_texture(x.transpose(2, 3)), rel=1e-12)
    one_way = torch.randn(50, 1, 8, 16).repeat_interleave(2, 2) + 0.1 * torch.randn(50, 1, 16, 16)  # rows in pairs
    texture = ablations.glow.grid_texture(one_way)
    assert texture > 1.2
    assert ablations.glow.grid_texture(one_way.transpose(2, 3)) == pytest.approx(texture, rel=1e-12)


def test_the_mixers_are_what_they_say():
    torch.manual_seed(0)
    assert list(ablations.glow.MIXERS) == ["1x1, LU", "1x1, plain", "1x1, fixed", "shuffle", "reversal", "nothing"]
    made = {name: mixer(16) for name, mixer in ablations.glow.MIXERS.items()}
    assert all(layer.channels == 16 for layer in made.values())
    assert [type(layer) for layer in made.values()] == [Invertible1x1Conv] * 3 + [ChannelPermutation] * 3
    assert (made["1x1, LU"].lu, made["1x1, plain"].lu, made["1x1, fixed"].lu) == (True, False, False)
    assert [made[name].weight.requires_grad for name in ("1x1, plain", "1x1, fixed")] == [True, False]
    assert made["reversal"].order.tolist() == list(range(15, -1, -1))
    assert made["nothing"].order.tolist() == list(range(16))
    orders = [tuple(ablations.glow.MIXERS["shuffle"](16).order.tolist()) for _ in range(5)]
    assert len({*orders, tuple(range(16)), tuple(range(15, -1, -1))}) == 7


TINY = {"steps_per_scale": 1, "hidden": 2, "steps": 10}  # the warm-up's


def test_an_arm_of_glow_repeats_and_its_seed_matters():
    first, again, other = (ablations.glow.glow_patches(seed, **TINY) for seed in (0, 0, 1))
    assert first == again
    assert set(first) == {"test", "grid", "broken", "parameters"}
    assert first["parameters"] == other["parameters"]
    for measure in ("test", "grid"):
        assert math.isfinite(first[measure])
        assert first[measure] != other[measure]
    assert 4 < first["test"] < 12
    assert first["broken"] == 0


@pytest.mark.parametrize("mixer", ablations.glow.MIXERS)
@pytest.mark.parametrize("bounded", [False, True])
def test_the_flow_of_an_arm_has_its_mixer_and_its_coupling(mixer, bounded):
    flow = ablations.glow.flow_of_patches(mixer, bounded, steps_per_scale=2, hidden=3)
    assert (flow.shape, flow.levels) == ((3, 16, 16), 256)
    names = kinds(flow)
    expected = type(ablations.glow.MIXERS[mixer](12))
    layers = [layer for layer in flow.modules() if isinstance(layer, Invertible1x1Conv | ChannelPermutation)]
    assert [(type(layer), layer.channels) for layer in layers] == [(expected, 12)] * 2 + [(expected, 24)] * 2
    assert all(layer.lu == (mixer == "1x1, LU") for layer in layers if isinstance(layer, Invertible1x1Conv))
    assert names.count("FactorOut") == 1
    coupling, other = ("BoundedGlowCoupling", "GlowCoupling")[:: 1 if bounded else -1]
    assert (names.count(coupling), names.count(other)) == (4, 0)
    usual = sum(p.numel() for p in glow((3, 16, 16), scales=2, steps=2, hidden=3).parameters())
    learned = 0 if expected is Invertible1x1Conv else 2 * 12**2 + 2 * 24**2
    assert sum(p.numel() for p in flow.parameters()) == usual - learned + 4 * bounded


def test_the_options_of_an_arm_reach_its_flow_and_its_training():
    """Other mixers, couplings, depths, widths and lengths give other numbers of parameters or other results."""
    usual = ablations.glow.glow_patches(0, **TINY)
    counts = {"bounded": True, "steps_per_scale": 2, "hidden": 3, "mixer": "nothing"}
    for name, value in counts.items():
        assert ablations.glow.glow_patches(0, **TINY | {name: value})["parameters"] != usual["parameters"]
    longer = ablations.glow.glow_patches(0, **TINY | {"steps": 30})
    assert longer["parameters"] == usual["parameters"]
    assert longer["test"] < usual["test"]


class Drawn(Bijection):
    """A stand-in for a flow that decodes every latent to the same images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        assert z.shape == self.images.shape
        return self.images


def test_the_grid_of_an_arm_is_that_of_its_finite_samples():
    """Samples are rounded to levels as the flow rounds them, and the share that is not finite is returned."""
    torch.manual_seed(0)
    drawn = 20 + squares(500, 0.5)
    drawn[5:7, 0, 4, 4] = torch.tensor([-1e6, 1e6])  # far beyond the levels
    drawn[[3, 77, 400], 0, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    flow = Flow([UniformDequantize(256), Drawn(drawn)], StandardNormal(), (3, 16, 16))
    grid, broken = ablations.glow.grid_of_samples(flow)
    assert broken == pytest.approx(3 / 500, rel=1e-4)
    kept = torch.cat([drawn[:3], drawn[4:77], drawn[78:400], drawn[401:]])
    assert grid == pytest.approx(ablations.glow.grid_texture(kept.floor().clamp(0, 255)), rel=1e-3)


def test_the_variants_of_the_first_updates_are_what_their_names_say(monkeypatch):
    """Each variant has its flow and first batch when training begins; the last variant stops being finite."""
    seen = {}

    def fit(flow, train, steps, **options):
        seen.update(flow=flow, initialized=flow.chain[3].log_scale.detach().clone())
        raise ablations.glow.NonFiniteLoss(type("History", (), {"loss": [math.nan], "grad_norm": [0.0]})())

    monkeypatch.setattr(ablations.glow, "fit", fit)
    scales = {}
    for name, arm in ablations.find("glow-first-updates").arms.items():
        assert arm(0, hidden=2) | {"start": 0.0} == {"start": 0.0, "test": math.inf, "updates": 1}
        couplings = [layer for layer in seen["flow"].modules() if isinstance(layer, GlowCoupling)]
        masked = [layer for layer in seen["flow"].modules() if isinstance(layer, AffineCoupling)]
        assert (len(couplings), len(masked)) == ((0, 8) if name in ("checkerboard", "channel mask") else (8, 0))
        assert all((layer.network.layers[-1].weight == 0).all() != ("no zeros" in name) for layer in couplings)
        assert all((layer.scale is torch.exp) == ("exp(h)" in name) for layer in couplings)
        if masked:  # two in a row swap what passes; a channel mask is the same at every position
            first, second = (layer.mask.squeeze() for layer in masked[:2])
            assert (first != second).all()
            assert ((first == first[..., :1, :1]).all() == (name == "channel mask")).all()
        scales[name] = seen["initialized"]
    assert (scales["exp(h)"] == scales["as it is"]).all()  # the others draw other numbers before their photographs
    assert (scales["from noise"] - math.log(math.sqrt(12))).abs().max() < 0.05  # uniform noise
    assert (scales["as it is"] - math.log(math.sqrt(12))).abs().max() > 0.05


def test_the_first_updates_repeat_and_learn():
    first, again, other = (ablations.glow.first_updates(seed, hidden=2, steps=3) for seed in (0, 0, 1))
    assert first == again != other
    assert first["updates"] == 3
    assert first["test"] < first["start"]


def test_the_arms_of_the_questions_about_glow_are_what_their_names_say():
    mixing, depth = ablations.find("glow-mixing"), ablations.find("glow-depth")
    assert list(mixing.arms) == list(ablations.glow.MIXERS)
    for name, arm in mixing.arms.items():
        assert (arm.func, arm.keywords["mixer"]) == (ablations.glow.glow_patches, name)
    for name, arm in depth.arms.items():
        steps, _, kind = name.partition(", ")
        assert arm.func is ablations.glow.glow_patches
        assert arm.keywords["steps_per_scale"] == int(steps)
        assert arm.keywords.get("bounded", False) == (kind == "bounded")
        assert ("hidden" in arm.keywords) == (kind == "wide")
        assert "steps" not in arm.keywords or kind == f"{arm.keywords['steps']} updates"


# --- the layers that see the context, and the scales ------------------------------------------------------------------


def test_dead_networks_are_those_that_it_names():
    """The named networks are 0 in all layers, and the other networks keep their random weights."""
    seen = {}
    for kinds in ((), ("couplings",), ("ActNorm and W",), ("ActNorm and W", "couplings")):
        flow = ablations.cglow.dead(cglow((1, 4, 4), (1, 4, 4), scales=1, steps=2, hidden=4, conditioning=4), *kinds)
        generators = [m for m in flow.modules() if isinstance(m, ConditioningNetwork)]
        features = [m.features for m in flow.modules() if isinstance(m, ConditionalNet)]
        assert (len(generators), len(features)) == (4, 2)
        for networks, kind in ((generators, "ActNorm and W"), (features, "couplings")):
            silent = [not any(parameter.any() for parameter in network.parameters()) for network in networks]
            assert silent == [kind in kinds] * len(networks)
        seen[kinds] = sum(parameter.numel() for parameter in flow.parameters())
    assert len(set(seen.values())) == 1


def test_the_label_is_ten_more_channels():
    images = data.digit_halves("test")
    assert ablations.cglow.contexts_of(images, False) is images.contexts
    told = ablations.cglow.contexts_of(images, True)
    assert told.shape == (299, 11, 4, 8)
    assert torch.equal(told[:, :1], images.contexts)
    assert torch.equal(told[:, 1:].argmax(1), images.labels[:, None, None].expand(-1, 4, 8))
    assert torch.equal(told[:, 1:].sum(1), torch.ones(299, 4, 8))


def test_neighbours_by_hand():
    """After the mean is subtracted, constant rows have correlation 1, alternating rows have correlation -1."""
    mean = torch.arange(32.0).reshape(1, 1, 4, 8).expand(5, -1, -1, -1)
    rows = torch.randn(5, 1, 4, 1).expand(-1, -1, -1, 8)
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    assert ablations.cglow.neighbours(mean + rows, mean) == pytest.approx(1, abs=1e-4)
    assert ablations.cglow.neighbours(mean + signs, mean) == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"label": True}, {"independent": True}], ids=str)
def test_an_arm_of_cglow_repeats_and_its_seed_matters(options):
    short = {"steps": 30, "draws": 10} | options
    first, again, other = (ablations.cglow.halves(seed, **short) for seed in (0, 0, 1))
    assert first == again
    assert first["test"] != other["test"]
    assert 2 < first["test"] < 4.1
    assert list(first["rms"]) == ["1", "10"]
    assert first["rms"]["10"] < first["rms"]["1"]
    assert (first["test_closer"] == first["test"]) == ("independent" in options)


def test_the_arms_of_cglow_are_what_their_names_say():
    arms = ablations.find("cglow-conditioning").arms
    said = {name: getattr(arm, "keywords", {}) for name, arm in arms.items()}
    assert said["all three"] == {}
    assert said["couplings only"] == {"without": ("ActNorm and W",)}
    assert said["ActNorm and W only"] == {"without": ("couplings",)}
    assert said["none"] == {"without": ("ActNorm and W", "couplings")}
    assert said["all three, and the label"] == {"label": True}
    assert said["independent pixels"] == {"independent": True}


def test_the_bare_reshape_is_invertible_and_no_squeeze():
    layer, x = ablations.multiscale._BareReshape(), torch.randn(2, 3, 4, 6)
    z, log_det = layer(x)
    assert torch.equal(layer.inverse(z), x)
    assert torch.equal(log_det, torch.zeros(2))
    assert z.shape == Squeeze()(x)[0].shape
    assert not torch.equal(z, Squeeze()(x)[0])
    assert torch.equal(z[:, 0].flatten(1), x[:, 0, 0].flatten(1)[:, :6])


def test_an_arm_of_multiscale_repeats_and_its_layer_matters():
    one_squeeze = ablations.multiscale.one_squeeze
    first, again, other = (one_squeeze(seed, steps=3) for seed in (0, 0, 1))
    assert first == again
    assert first["test"] != other["test"]
    torn = ablations.find("multiscale-squeeze").arms["bare reshape"](0, steps=3)
    assert torn["parameters"] == first["parameters"]
    assert torn["test"] != first["test"]


def test_the_arms_of_scales_are_what_their_names_say():
    arms = ablations.find("multiscale-scales").arms
    assert {name: (arm.keywords["scales"], arm.keywords["couplings"]) for name, arm in arms.items()} == {
        "1": (1, 8),
        "2": (2, 2),
        "3": (3, 2),
    }
    assert math.isfinite(arms["3"](0, steps=2)["test"])


# --- running them -----------------------------------------------------------------------------------------------------


def test_run_stores_what_the_arms_return(monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "ROOT", tmp_path)
    small = ablations.Ablation("Which?", (3, 4), {"a": lambda seed: {"x": seed}, "b": lambda seed: {"x": 2 * seed}})
    monkeypatch.setitem(ablations.ABLATIONS, "small", small)
    ablations.run("small", archive.origin())
    record = ablations.load("small")
    assert record["results"] == {"a": [{"x": 3}, {"x": 4}], "b": [{"x": 6}, {"x": 8}]}
    assert record["command"] == "python -m nflows_lib.ablations small"
    assert record["torch"] == torch.__version__


def test_a_table_has_means_deviations_and_the_names_it_is_given(capsys):
    record = {
        "command": "python -m nflows_lib.ablations small",
        "commit": "abc1234",
        "hardware": "1 CPU thread",
        "seeds": [0, 1],
        "results": {"a": [{"x": 1.0, "y": 3}, {"x": 2.0, "y": 3}], "b": [{"x": 11.0, "y": 4}, {"x": 11.0, "y": 5}]},
    }
    values = ablations.print_table(record, {"x": "bits/dim", "y": "a long heading here"}, {"b": "second", "a": "first"})
    assert values == {"x": {"b": [11.0, 11.0], "a": [1.0, 2.0]}, "y": {"b": [4, 5], "a": [3, 3]}}
    assert capsys.readouterr().out.splitlines() == [
        "python -m nflows_lib.ablations small",
        "commit abc1234, 1 CPU thread",
        "mean ± standard deviation over 2 seeds",
        "              bits/dim  a long heading here",
        "second  11.000 ± 0.000        4.500 ± 0.707",
        " first   1.500 ± 0.707        3.000 ± 0.000",
    ]


def test_an_unknown_ablation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ablation: expected one of nice-activation, .*, got 'none'"):
        ablations.load("none")


def test_the_command_refuses_an_unknown_ablation_before_it_runs_one(capsys):
    with pytest.raises(SystemExit) as caught:
        ablations.main(["nice-activation", "none"])
    assert caught.value.code == 2
    assert "NAME: expected some of nice-activation, " in capsys.readouterr().err
