"""Tests of the experiment on the grid in Glow's samples: its layers, its flows and its measures."""

from __future__ import annotations

import base64
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nflows_lib.coupling import AffineCoupling
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments.ablations import grid
from nflows_lib.experiments.ablations.glow import finite_samples, grid_texture
from nflows_lib.experiments.ablations.grid import HaarSqueeze, Reflected, ShiftedSquares, grid_glow
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.multiscale import Squeeze
from nflows_lib.networks import ActNormConv, GlowNet, ZeroConv


def test_the_haar_squeeze_gives_the_mean_and_three_differences():
    square = torch.tensor([[1.0, 2], [5, 12]])
    z, _ = HaarSqueeze()(square[None, None])
    left_right, top_bottom, diagonal = (1 + 5) - (2 + 12), (1 + 2) - (5 + 12), (1 + 12) - (2 + 5)
    assert (2 * z.flatten()).tolist() == [20, left_right, top_bottom, diagonal]
    assert HaarSqueeze().inverse(z)[0, 0].tolist() == square.tolist()


def test_shifted_squares_begin_one_pixel_further():
    image = torch.arange(2 * 36.0).reshape(1, 2, 6, 6)
    squares, _ = Squeeze()(image)
    shifted, _ = ShiftedSquares(1)(squares)
    assert shifted[0, :4, 0, 1].tolist() == image[0, 0, 1:3, 3:5].flatten().tolist()
    assert shifted[0, 4:, 1, 1].tolist() == image[0, 1, 3:5, 3:5].flatten().tolist()
    assert shifted[0, :4, 2, 2].tolist() == [image[0, 0, y, x].item() for y in (5, 0) for x in (5, 0)]
    assert torch.equal(ShiftedSquares(-1)(shifted)[0], squares)
    with pytest.raises(ValueError, match=r"shape: expected \(4 C, H, W\), got \(6, 2, 2\)"):
        ShiftedSquares(1)(torch.zeros(1, 6, 2, 2))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: ActNormConv(2, 3, 3)])
def test_a_reflected_convolution_pads_by_reflection_and_not_by_zeros(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(4, 2, 5, 6)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), layer.weight, layer.bias)
    torch.testing.assert_close(Reflected(layer)(x), expected)
    assert not torch.allclose(layer(x), expected)


ARMS = grid.ABLATIONS["glow-grid"].arms
CHANGES = {name: getattr(arm, "keywords", {}) for name, arm in ARMS.items() if "updates" not in name}


def test_without_a_change_it_is_the_library_s_bounded_glow():
    ours, library = grid_glow(), glow((3, 16, 16), scales=2, steps=4, hidden=32, bounded=True)
    assert list(ours.state_dict()) == list(library.state_dict())
    assert ours.summary() == library.summary()


def test_each_variant_makes_one_change():
    assert all(len(change) <= 1 for change in CHANGES.values())
    kinds = {name: Counter(type(m) for m in grid_glow(**change).modules()) for name, change in CHANGES.items()}
    usual = kinds["Glow"]
    found = {name: {k.__name__: counts[k] - usual[k] for k in counts | usual if counts[k] != usual[k]}
             for name, counts in kinds.items()}  # fmt: skip
    assert found == {
        "Glow": {},
        "deep prior": {"ZeroConv": -1, "GlowNet": 1, "ActNormConv": 2, "Sequential": 1, "ReLU": 2},
        "Haar": {"Squeeze": -2, "HaarSqueeze": 2},
        "reflected": {"Reflected": 17},  # the two 3x3 convolutions of each coupling, and that of the prior
        "couplings before": {
            "AffineCoupling": 2, "GlowNet": 2, "ActNormConv": 4, "Sequential": 2, "ReLU": 4, "Conv2d": 2
        },
        "shifted": {"ShiftedSquares": 8},
    }  # fmt: skip
    counted = {name: sum(p.numel() for p in grid_glow(**change).parameters()) for name, change in CHANGES.items()}
    more = {name for name, count in counted.items() if count != counted["Glow"]}
    assert more == {"deep prior", "couplings before"}
    assert ARMS["shifted, 800 updates"].keywords == CHANGES["shifted"] | {"updates": 800}


def test_the_changes_are_where_they_should_be():
    layers = list(grid_glow(before=2).chain)
    kinds = [type(layer) for layer in layers]
    assert kinds[2:5] == [AffineCoupling, AffineCoupling, Squeeze]
    assert torch.equal(layers[2].mask, ~layers[3].mask)
    for name, kind in (("Glow", ZeroConv), ("deep prior", GlowNet)):
        assert type(grid_glow(**CHANGES[name]).chain[-1].prior) is kind
    flow = grid_glow(shifted=True)
    for scale in (flow.chain, flow.chain[-1].inner):
        shifts = [layer.pixels for layer in scale if isinstance(layer, ShiftedSquares)]
        assert shifts == [1, -1, 1, -1]
    reflected = grid_glow(reflected=True)
    bare = [m for m in reflected.modules() if isinstance(m, nn.Conv2d | ActNormConv) and m.weight.shape[2] == 3]
    assert {id(m) for m in bare} == {id(m.layer) for m in reflected.modules() if isinstance(m, Reflected)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_variant_starts_from_a_first_batch_and_inverts(name):
    torch.manual_seed(0)
    flow = grid_glow(**CHANGES[name])
    images = torch.randint(256, (8, 3, 16, 16))
    flow.initialize(images)
    latent = flow[1:].encode(images.float() + 0.5)
    assert latent.std().item() == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(flow[1:].decode(latent), images + 0.5, atol=1e-2, rtol=0)


def test_the_steps_by_place_and_their_ratios_by_hand():
    """A staircase that steps by 1 inside squares, by 2 at the borders of 2x2 and by 6 at those of 4x4 squares."""
    places = [1, 2, 1, 6, 1, 2, 1]
    stairs = torch.tensor([0, *torch.tensor(places).cumsum(0)])
    image = stairs + stairs[:, None]
    assert grid.steps_by_place(image.byte()[None, None].repeat(2, 3, 1, 1)) == places
    rows = grid.steps_by_place((stairs[:, None] * torch.ones(8)).byte()[None, None])
    assert rows == [step / 2 for step in places]
    assert grid.border_ratios(places) == [2, 6]
    assert grid.border_ratios([1.0] * 15) == [1, 1]
    assert grid.border_ratios([1, 2, 1, 4, 1, 2, 1, 8] * 3 + places, squeezes=3) == [2, 4.5, 8]  # the last 4 is a 6
    assert grid_texture(image[None, None]) == pytest.approx((2 + 6 + 2) / 3)


def test_the_temperature_multiplies_the_latents():
    torch.manual_seed(0)
    flow = Flow([UniformDequantize(256), Rescale(1 / 60)], StandardNormal(), (3, 16, 16))
    usual, cold = (finite_samples(flow, temperature=t).mean().item() for t in (1.0, 0.7))
    assert cold == pytest.approx(0.7 * usual, rel=0.02)


def test_an_arm_repeats_and_its_record_holds_samples(monkeypatch):
    temperatures = []

    def listening(flow, n=500, temperature=1.0):
        temperatures.append(temperature)
        return finite_samples(flow, n, temperature)

    monkeypatch.setattr(grid, "finite_samples", listening)
    first, again, other = (grid.glow_grid(seed, updates=2, steps=1, hidden=2) for seed in (0, 0, 1))
    assert first == again
    assert temperatures == [1.0, 0.7] * 3
    assert first["samples"] != other["samples"]
    assert first["parameters"] == other["parameters"]
    assert all(math.isfinite(first[key]) and first[key] != other[key] for key in ("test", "grid", "cold"))
    assert [first["fine"], first["coarse"]] == grid.border_ratios(first["steps"])
    assert first["kept"] == 500
    levels = torch.frombuffer(bytearray(base64.b64decode(first["samples"])), dtype=torch.uint8)
    assert levels.reshape(grid.SHOWN, 3, 16, 16).float().std() > 5
