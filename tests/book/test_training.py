"""Tests of training in the page: its gradients and steps are PyTorch's, its limits are right, and the element works."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright._impl._driver import compute_driver_executable
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nflows_lib import data
from nflows_lib.bijection import Bijection
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling
from nflows_lib.distributions import StandardLogistic
from nflows_lib.experiments import export
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "_extra" / "playground"
sys.path.insert(0, str(ROOT / "tools"))
import playground  # noqa: E402  (a script, not a package)

NODE = compute_driver_executable()[0]
# All numbers that JSON lacks come back as null.
START = """
const vm = require("vm"), fs = require("fs");
for (const file of ["train.js", "flow.js"]) vm.runInThisContext(fs.readFileSync(`${process.argv[1]}/${file}`, "utf8"));
const T = PlaygroundTraining, told = JSON.parse(fs.readFileSync(0, "utf8"));
const print = (value) => console.log(JSON.stringify(value));
const columns = (rows) => Float64Array.from(rows[0].flatMap((_, i) => rows.map((row) => row[i])));
"""


def in_node(script: str, **told: Any) -> Any:
    """What a script prints in Node, with the page's mathematics as T and the arguments as told."""
    ran = subprocess.run(
        [NODE, "-e", START + script, str(SCRIPTS)], input=json.dumps(told), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


class Unmasked(Bijection):
    """F3 in two halves: the network shifts the half that it reads as well."""

    def __init__(self, mask: Tensor, network: nn.Module) -> None:
        super().__init__()
        self.mask, self.network = mask, network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self.network(x[:, self.mask]), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z - self.network(z[:, self.mask])


def described(dims: int, base: str, *kinds: str, depth: int = 1, activation: str = "silu") -> dict[str, Any]:
    """A description of a flow with these kinds of layers and random weights; "tanh" is an affine coupling without it."""
    layers: list[dict[str, Any]] = []
    for k, kind in enumerate(kinds):
        if kind == "scaling":
            layers.append({"kind": kind, "log_scale": (0.4 * torch.randn(dims)).tolist()})
            continue
        passes = [int((i + k) % 2 == 0) for i in range(dims)]
        out = dims if kind == "unmasked" else (dims - sum(passes)) * (1 if kind == "additive" else 2)
        sizes = [sum(passes), *[5] * depth, out]
        weights = (0.5 * torch.randn(sum((a + 1) * b for a, b in itertools.pairwise(sizes)))).tolist()
        layer = {"kind": "affine" if kind == "tanh" else kind, "passes": passes, "weights": weights}
        layers.append(layer | {"widths": [5] * depth, "activation": activation} | ({"gain": 0.8} if kind == "affine" else {}))
    return {"dims": dims, "base": base, "layers": layers}


def in_torch(description: dict[str, Any]) -> Flow:
    """The described flow in float64."""
    layers: list[nn.Module] = []
    dims = description["dims"]
    for layer in description["layers"]:
        if layer["kind"] == "scaling":
            layers.append(DiagonalScaling(dims).double())
            layers[-1].log_scale.data = torch.tensor(layer["log_scale"], dtype=torch.float64)
            continue
        mask, widths = torch.tensor(layer["passes"]).bool(), layer["widths"]
        affine = layer["kind"] == "affine"
        outputs = dims if layer["kind"] == "unmasked" else (2 if affine else 1) * int((~mask).sum())
        network = MLP(int(mask.sum()), outputs, widths[0], len(widths), export.ACTIVATIONS[layer["activation"]]).double()
        vector_to_parameters(torch.tensor(layer["weights"], dtype=torch.float64), network.parameters())
        kind = {"additive": AdditiveCoupling, "unmasked": Unmasked}.get(layer["kind"])
        layers.append((kind or (AffineCoupling if "gain" in layer else playground.Untamed))(mask, network).double())
        if "gain" in layer:
            layers[-1].gain.data.fill_(layer["gain"])
    return Flow(layers, export.BASES[description["base"]](), (dims,)).double()


def numbers_of(flow: Flow, read: Any) -> Tensor:
    """One number per parameter, in the order in which the page keeps them: a coupling's gain before its network."""
    kept = []
    for layer in flow.chain:
        own = [layer.log_scale] if isinstance(layer, DiagonalScaling) else [*layer.network.parameters()]
        if type(layer) is AffineCoupling:
            own.insert(0, layer.gain)
        kept += [read(parameter) for parameter in own]
    return parameters_to_vector(kept)


def loss_of(flow: Flow, x: Tensor, share: float) -> Tensor:
    """The mean of -(log base + share * log-det) in nats."""
    log_det = torch.zeros(len(x), dtype=x.dtype)
    for layer in flow.chain:
        x, contribution = layer(x)
        log_det = log_det + contribution
    return -(flow.base.log_prob(x) + share * log_det).mean()


WHOLE = {
    "NICE": ("additive",) * 4 + ("scaling",),
    "RealNVP": ("affine",) * 4,
    "no tanh": ("tanh",) * 3,
    "not masked": ("unmasked",) * 3 + ("scaling",),
    "all kinds": ("affine", "additive", "scaling", "unmasked", "tanh"),
}
SINGLE = {kind: (kind,) for kind in ("scaling", "additive", "affine", "tanh", "unmasked")}


@pytest.mark.parametrize("share", [1, 0, -1], ids=["likelihood", "log-det left out", "log-det subtracted"])
@pytest.mark.parametrize("kinds", [*(SINGLE | WHOLE).values()], ids=[*(SINGLE | WHOLE)])
def test_the_loss_and_every_gradient_are_pytorchs(kinds: tuple[str, ...], share: float) -> None:
    """For two sizes, both bases, and every activation, within 1e-6 of float64."""
    torch.manual_seed(0)
    cases = []
    for dims, base, depth, activation in ((2, "normal", 1, "silu"), (3, "logistic", 2, "tanh"), (4, "logistic", 1, "relu")):
        description = described(dims, base, *kinds, depth=depth, activation=activation)
        cases.append((description, torch.randn(7, dims, dtype=torch.float64)))
    script = """
print(told.cases.map(([description, x]) => {
  const flow = new T.TrainableFlow(description);
  const loss = flow.lossAndGradient(columns(x), x.length, told.share);
  const { logProb } = flow.logProb(columns(x), x.length);
  return { loss, gradient: flow.parameters.flatMap(({ gradients }) => [...gradients]), logProb: [...logProb] };
}));"""
    found = in_node(script, cases=[(description, x.tolist()) for description, x in cases], share=share)
    for (description, x), answer in zip(cases, found, strict=True):
        flow = in_torch(description)
        loss = loss_of(flow, x, share)
        loss.backward()
        zero = torch.zeros_like
        expected = numbers_of(flow, lambda parameter: zero(parameter) if parameter.grad is None else parameter.grad)
        assert answer["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
        torch.testing.assert_close(torch.tensor(answer["gradient"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(answer["logProb"]).double(), flow.log_prob(x).detach(), rtol=1e-5, atol=1e-5)
        assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("clip", [None, 0.3], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("kinds", WHOLE.values(), ids=WHOLE)
def test_ten_adam_steps_are_pytorchs(kinds: tuple[str, ...], clip: float | None) -> None:
    torch.manual_seed(1)
    description = described(2, "normal", *kinds)
    batches = torch.randn(10, 32, 2, dtype=torch.float64)
    script = """
const flow = new T.TrainableFlow(told.description);
const adam = new T.Adam(flow.parameters, 0.01, told.clip);
for (const x of told.batches) {
  flow.lossAndGradient(columns(x), x.length);
  adam.step();
}
print({ values: flow.parameters.flatMap(({ values }) => [...values]), again: flow.write() });"""
    found = in_node(script, description=description, batches=batches.tolist(), clip=clip)
    flow = in_torch(description)
    before = numbers_of(flow, lambda parameter: parameter.detach().clone())
    adam = torch.optim.Adam(flow.parameters(), lr=0.01)
    for x in batches:
        adam.zero_grad()
        loss_of(flow, x, 1).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(flow.parameters(), clip)
            assert norm > clip
        adam.step()
    expected = numbers_of(flow, lambda parameter: parameter.detach())
    values = torch.tensor(found["values"], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    assert (values - before).abs().max() > 0.05
    # What the flow writes is a description of the trained flow.
    read = in_torch(found["again"])
    torch.testing.assert_close(numbers_of(read, lambda parameter: parameter.detach()), expected, rtol=1e-6, atol=1e-6)


def test_the_inverse_returns_the_points() -> None:
    """Of every kind of layer but the unmasked one, whose inverse is no inverse."""
    torch.manual_seed(2)
    x = torch.randn(50, 3, dtype=torch.float64)
    script = """
print(told.descriptions.map((description) => {
  const flow = new T.TrainableFlow(description);
  const { latent } = flow.logProb(columns(told.x), told.x.length);
  const back = flow.inverse(latent, told.x.length);
  return Math.max(...back.map((v, at) => Math.abs(v - columns(told.x)[at])));
}));"""
    kinds = [("scaling",), ("additive",), ("affine",), ("tanh",), ("unmasked",)]
    missed = in_node(script, descriptions=[described(3, "normal", *kind) for kind in kinds], x=x.tolist())
    assert max(missed[:4]) < 1e-9
    assert missed[4] > 0.1


# --- the data and their limits ----------------------------------------------------------------------------------------

SETS = {"gaussians": "two_gaussians", "moons": "moons", "circles": "circles", "spiral": "swiss_roll"}


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """For each set 20,000 draws, the entropy, and for each base the optimum of the maps that keep volume."""
    script = """
const facts = {};
for (const name of told.names) {
  const set = T.makeData(name, [[0.5, -1]]);
  const x = set.draw(new T.Random(3), 20000);
  facts[name] = {
    x: [0, 1].map((i) => [...x.subarray(i * 20000, (i + 1) * 20000)]),
    entropy: T.entropyOf(set),
    optimum: { normal: T.volumePreservingOptimum(set, "normal"), logistic: T.volumePreservingOptimum(set, "logistic") },
  };
}
print(facts);"""
    return in_node(script, names=[*SETS, "numbers", "own"])


@pytest.mark.parametrize("name", SETS)
def test_the_sets_are_those_of_the_course(facts: dict[str, Any], name: str) -> None:
    """Mean, covariance and quartiles agree with the library's set of the same name."""
    torch.manual_seed(0)
    ours, theirs = torch.tensor(facts[name]["x"]).T, data.toy(SETS[name], 20_000)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(ours.T.cov(), theirs.T.cov(), rtol=0, atol=0.1)
    quartiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(ours.abs().quantile(quartiles, 0), theirs.abs().quantile(quartiles, 0), rtol=0, atol=0.1)


def test_the_entropies_are_right(facts: dict[str, Any]) -> None:
    """Against the library's exact densities, a closed form, and the table of the whole numbers."""
    for name, truth in (("gaussians", data.two_gaussians()), ("moons", data.moons())):
        x = torch.tensor(facts[name]["x"]).T
        log_p = truth.log_prob(x)
        error = log_p.std().item() / len(x) ** 0.5
        assert facts[name]["entropy"] == pytest.approx(-log_p.mean().item(), abs=5 * error)
    assert facts["own"]["entropy"] == pytest.approx(math.log(2 * math.pi * math.e * 0.15**2), abs=1e-4)
    shares = [6 / 16, 2 / 16, 3 / 16, 5 / 16]
    assert facts["numbers"]["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-9)
    cells = torch.tensor(facts["numbers"]["x"]).floor().long() + 1  # (2, N), from 0 to 1
    found = torch.bincount(2 * cells[1] + cells[0], minlength=4) / cells.shape[1]
    torch.testing.assert_close(found, torch.tensor(shares), rtol=0, atol=0.02)


def test_the_volume_preserving_optimum_is_right(facts: dict[str, Any]) -> None:
    """Against a closed form, and for both bases against the ranks of a Monte Carlo estimate."""
    # One round Gaussian of standard deviation s: the best map is the identity, and the loss log 2 pi + s^2.
    assert facts["own"]["optimum"]["normal"] == pytest.approx(math.log(2 * math.pi) + 0.15**2, abs=1e-3)
    # The map of a point x: the volume of the superlevel set of x, which a fine grid counts, has the base's density.
    side = 0.01
    line = torch.arange(-7, 7, side) + side / 2
    truth = data.two_gaussians()
    grid = torch.cartesian_prod(line[line.abs() < 4.5], line[line.abs() < 2.5])
    log_p = truth.log_prob(grid).sort(descending=True).values.double()
    base = StandardLogistic().log_prob(torch.cartesian_prod(line, line)).sort(descending=True).values[: len(log_p)].double()
    volume = torch.arange(len(log_p)).double() * side**2
    mass = log_p.exp() * side**2
    by_normal = (mass * (math.log(2 * math.pi) + volume / (2 * math.pi))).sum().item()
    assert facts["gaussians"]["optimum"]["normal"] == pytest.approx(by_normal, abs=0.005)
    assert facts["gaussians"]["optimum"]["logistic"] == pytest.approx(-(mass * base).sum().item(), abs=0.005)
    for fact in facts.values():
        assert fact["optimum"]["normal"] > max(fact["entropy"], math.log(2 * math.pi))
        assert fact["optimum"]["logistic"] > max(fact["entropy"], 2 * math.log(4))


# --- what the failures do ---------------------------------------------------------------------------------------------

CHOICES = {"data": "gaussians", "model": "nice", "base": "normal", "couplings": 8, "width": 24, "rate": 0.01, "seed": 1}


def trained(steps: int, *variants: list[str], **choices: Any) -> list[dict[str, Any]]:
    """What the page shows of these flows after some steps; "loss" is the mean of the last 100."""
    script = """
const session = new T.Session({ ...told.choices, own: [] }, told.variants);
for (let i = 0; i < told.steps && !session.over; i++) session.step();
print(session.picture(3.6, 72).flows.map(({ losses, nll, logDet, latentStd, mass, missed, stopped, samples, points, latents }) => ({
  nll, logDet, latentStd, mass, missed, stopped, first: losses[0], points: [...points], latents: [...latents],
  loss: losses.slice(-100).reduce((a, b) => a + b, 0) / Math.min(100, losses.length),
  width: Math.sqrt(samples.reduce((a, v) => a + v * v, 0) / samples.length),
})));"""
    return in_node(script, choices=CHOICES | choices, variants=variants, steps=steps)
