"""Tests of training in the page: its gradients and steps are PyTorch's, its limits are right, and the element works."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import playground
import pytest
import torch
from playwright._impl._driver import compute_driver_executable
from playwright.sync_api import Browser, Page
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nflows_lib import data, models
from nflows_lib.bijection import Bijection
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling
from nflows_lib.distributions import StandardLogistic
from nflows_lib.experiments import export
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "_extra" / "playground"

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
    """A description of a flow of these layers, with random weights; "tanh" is an affine coupling without a tanh."""
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
        layers.append(
            layer | {"widths": [5] * depth, "activation": activation} | ({"gain": 0.8} if kind == "affine" else {})
        )
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
        network = MLP(
            int(mask.sum()), outputs, widths[0], len(widths), export.ACTIVATIONS[layer["activation"]]
        ).double()
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


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


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
    for dims, base, depth, activation in (
        (2, "normal", 1, "silu"),
        (3, "logistic", 2, "tanh"),
        (4, "logistic", 1, "relu"),
    ):
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
        expected = numbers_of(flow, gradient)
        assert answer["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
        torch.testing.assert_close(
            torch.tensor(answer["gradient"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            torch.tensor(answer["logProb"]).double(), flow.log_prob(x).detach(), rtol=1e-5, atol=1e-5
        )
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
    base = (
        StandardLogistic()
        .log_prob(torch.cartesian_prod(line, line))
        .sort(descending=True)
        .values[: len(log_p)]
        .double()
    )
    volume = torch.arange(len(log_p)).double() * side**2
    mass = log_p.exp() * side**2
    by_normal = (mass * (math.log(2 * math.pi) + volume / (2 * math.pi))).sum().item()
    assert facts["gaussians"]["optimum"]["normal"] == pytest.approx(by_normal, abs=0.005)
    assert facts["gaussians"]["optimum"]["logistic"] == pytest.approx(-(mass * base).sum().item(), abs=0.005)
    for fact in facts.values():
        assert fact["optimum"]["normal"] > max(fact["entropy"], math.log(2 * math.pi))
        assert fact["optimum"]["logistic"] > max(fact["entropy"], 2 * math.log(4))


# --- what the failures do ---------------------------------------------------------------------------------------------

CHOICES = {"data": "moons", "model": "nice", "base": "normal", "couplings": 8, "width": 24, "rate": 0.01, "seed": 1}


def test_what_the_page_says_of_the_failures() -> None:
    """Every claim of the page's table that a number can decide is true."""
    script = """
const session = new T.Session({ ...told.choices, own: [] }, told.variants);
for (let i = 0; i < told.steps && !session.over; i++) session.step();
const set = T.makeData(told.choices.data);
const mean = (losses) => losses.reduce((a, b) => a + b, 0) / losses.length;
print({
  flows: session.picture(3.6, 72).flows.map((flow) => ({
    ...flow, points: [...flow.points], latents: [...flow.latents], far: Math.max(...flow.samples.map(Math.abs)),
    loss: mean(flow.losses.slice(-100)), most: Math.max(...flow.losses),
    norm: Math.max(...flow.norms.filter(Number.isFinite)),
    least: Math.min(...flow.losses.map((_, i, all) => mean(all.slice(i, i + 50)))),
  })),
  entropy: T.entropyOf(set), optimum: T.volumePreservingOptimum(set, told.choices.base),
});"""

    def trained(steps: int, *failures: str, alone: bool = False, **choices: Any) -> list[dict[str, Any]]:
        """The page's facts of the set, and of a sound flow (unless the broken one is alone) and a broken one."""
        variants = [failures] if alone else [[], failures]
        found = in_node(script, choices=CHOICES | choices, variants=variants, steps=steps)
        return [found, *found["flows"]]

    facts, sound, broken = trained(450, "scaling")
    assert facts["optimum"] == pytest.approx(2.02, abs=0.005)
    assert facts["optimum"] < broken["nll"] < facts["optimum"] + 0.15
    assert broken["logDet"] == 0
    assert broken["nll"] - sound["nll"] == pytest.approx(0.6, abs=0.25)
    assert max(broken["latentStd"]) < 0.7 < min(sound["latentStd"])

    _, sound, broken = trained(300, "logdet")
    assert math.log(2 * math.pi) < broken["loss"] < math.log(2 * math.pi) + 0.15
    assert max(broken["latentStd"]) < 0.3
    assert broken["nll"] > sound["nll"] + 1
    assert broken["far"] > 2 * sound["far"]
    _, broken = trained(200, "sign", alone=True)
    assert broken["loss"] < facts["entropy"] - 1

    facts, broken = trained(300, "alternation", alone=True)
    first, latent = (torch.tensor(broken[key][:300]) for key in ("points", "latents"))
    assert torch.equal(first.argsort(), latent.argsort())
    assert broken["nll"] == pytest.approx(facts["entropy"] + 1.4, abs=0.12)

    facts, broken = trained(300, "mask", alone=True)
    assert broken["loss"] < facts["entropy"] - 1
    assert broken["mass"] > 500
    assert broken["missed"] > 1

    _, sound, broken = trained(60, "tanh", "clipping", model="realnvp")
    assert broken["stopped"] == {"step": 49, "what": "loss"}
    assert broken["norm"] > 1e10
    assert sound["stopped"] is None
    _, sound, broken = trained(200, "clipping", model="realnvp")
    assert broken["nll"] == pytest.approx(sound["nll"], abs=0.4)
    facts, broken = trained(450, "rate", alone=True, model="realnvp")
    assert broken["most"] > 1e6
    assert broken["nll"] > facts["entropy"] + 1  # a sound flow is 0.4 above the entropy

    _, broken = trained(800, "column", rate=0.003, alone=True)
    assert broken["least"] < 0
    facts, sound, broken = trained(300, "noise", data="numbers", model="realnvp", rate=0.003)
    assert broken["least"] < 0 < facts["entropy"] < sound["nll"]
    latent = torch.tensor(broken["latents"]).view(2, -1).T
    assert len(latent.unique(dim=0)) == 4


# --- in a browser -----------------------------------------------------------------------------------------------------

IT = "document.querySelector('flow-trainer')"


@pytest.fixture(scope="module")
def page(book: Path, opened: Callable[..., AbstractContextManager[Page]]) -> Iterator[Page]:
    """The playground's page, opened from its file."""
    with opened((book / "chapters" / "playground.html").as_uri(), "file:", "blob:", "data:") as page:
        yield page


def go(page: Page, address: str) -> None:
    """Follow a link to a state of the element, stop the training that this starts, and wait for the first picture."""
    before = page.evaluate(f"{IT}.session")
    page.evaluate("address => { history.replaceState(null, '', '#'); location.hash = address; }", address)
    page.wait_for_function(f"{IT}.session > {before}")
    page.evaluate(f"{IT}.running && ({IT}.train(false), {IT}.change({{}}))")
    page.wait_for_function(f"{IT}.worker && {IT}.flows[0].density && {IT}.steps === 0")


def press(page: Page, name: str) -> None:
    page.locator("flow-trainer").get_by_role("button", name=name, exact=True).click()


def steps(page: Page, n: int) -> None:
    """Take steps without a clock, and wait for the picture after them."""
    before = page.evaluate(f"{IT}.steps")
    page.evaluate(f"{IT}.worker.postMessage({{ steps: {n} }})")
    page.wait_for_function(f"{IT}.steps === {before + n}")


def shown(page: Page) -> list[dict[str, Any]]:
    """The numbers of each flow that the page shows."""
    return page.evaluate(
        f"{IT}.flows.map(({{ nll, mass, stopped, latentStd }}) => ({{ nll, mass, stopped, latentStd }}))"
    )


USUAL = 10.0  # ms that 400,000 sines take in the page while two flows train and another test runs


def test_two_flows_learn_in_time_and_a_click_is_answered(page: Page) -> None:
    """In 20 s NICE comes within 0.3 nats of the entropy, and without its scaling within 0.15 of its optimum."""
    go(page, "train=gaussians&broken=scaling")
    entropy, optimum = page.evaluate(f"[{IT}.entropy, {IT}.limits.find(({{ text }}) => text.startsWith('best')).at]")
    press(page, "Train")
    page.wait_for_function(
        f"{IT}.flows[0].nll < {entropy} + 0.3 && {IT}.flows[1].nll < {optimum} + 0.15", timeout=20_000, polling=100
    )
    assert shown(page)[1]["nll"] > optimum
    # While it trains: the time from a click to the next picture of the page, and to the worker's answer, in ms.
    waited = page.evaluate(
        f"""async () => {{
          const it = {IT};
          const frame = () => new Promise(requestAnimationFrame);
          const found = {{ click: [], worker: [], work: [], pictures: 0 }};
          const receive = it.receive.bind(it);
          it.receive = (data) => {{ found.pictures += data.picture ? 1 : 0; receive(data); }};
          const began = performance.now();
          for (let i = 0; i < 10; i++) {{
            let start = performance.now();
            for (let j = 0, sum = 0; j < 400_000; j++) sum += Math.sin(j);
            found.work.push(performance.now() - start);
            start = performance.now();
            it.toggles.samples.click();
            await frame();
            found.click.push(performance.now() - start);
            start = performance.now();
            await new Promise((done) => {{ it.afterWriting = done; it.worker.postMessage({{ write: 0 }}); }});
            found.worker.push(performance.now() - start);
            await new Promise((done) => setTimeout(done, 150));
          }}
          found.pictures /= (performance.now() - began) / 1000;
          delete it.receive;
          return found;
        }}"""
    )
    click, worker, work = (sorted(waited[name])[5] for name in ("click", "worker", "work"))
    print(f"click {click:.0f} ms, worker {worker:.0f} ms, the piece of work {work:.1f} ms")
    slower = max(1, work / USUAL)  # how much slower this machine is now than one on which the bound is 100 ms
    assert click < 100 * slower
    assert worker < 100 * slower
    assert waited["pictures"] > 4  # per second; about 10 where no other test runs beside this one
    press(page, "Pause")
    page.wait_for_timeout(200)
    paused = page.evaluate(f"{IT}.steps")
    page.wait_for_timeout(200)
    assert page.evaluate(f"{IT}.steps") == paused > 100


def test_every_failure_is_a_switch_with_its_entry(page: Page) -> None:
    """A failure is offered where it can be switched on; its story links to an entry of the clinic."""
    clinic = (ROOT / "chapters" / "clinic.md").read_text(encoding="utf-8")
    offered = {}
    for model, data_set in (("nice", "moons"), ("realnvp", "numbers")):
        go(page, f"train={data_set}&model={model}&couplings=2&width=8")  # drawn faster
        offered[model, data_set] = names = page.evaluate(
            f"Object.entries({IT}.switches).filter(([, input]) => !input.disabled).map(([name]) => name)"
        )
        for name in names:
            page.evaluate(f"{IT}.switches.{name}.click()")
            assert page.evaluate(f"[{IT}.broken, {IT}.names]") == [[name], ["sound", "broken"]]
            entry = page.locator("flow-trainer .story a").get_attribute("href").removeprefix("clinic.html#")
            assert f"({entry})=" in clinic
            page.evaluate(f"{IT}.switches.{name}.click()")
    everywhere = {"alternation", "logdet", "sign", "clipping", "rate"}
    assert set.intersection(*map(set, offered.values())) == everywhere
    assert set(offered["nice", "moons"]) - everywhere == {"scaling", "mask", "column"}
    assert set(offered["realnvp", "numbers"]) - everywhere == {"tanh", "noise"}
    assert page.locator("flow-trainer").get_by_label("output not masked (NICE)", exact=True).is_disabled()
    left_out, subtracted = (
        page.locator("flow-trainer").get_by_label(name, exact=True)
        for name in ("log-det left out of the loss", "log-det subtracted")
    )
    subtracted.check()
    left_out.check()
    assert not subtracted.is_checked()


def test_an_address_holds_the_whole_state(page: Page) -> None:
    go(page, "train=gaussians")
    for label, value in {
        "Data": "your own points",
        "Model": "RealNVP",
        "Base": "logistic",
        "Couplings": "4",
        "Hidden units": "16",
        "Learning rate": "0.003",
    }.items():
        page.locator("flow-trainer").get_by_role("combobox", name=label, exact=True).select_option(label=value)
    page.locator("flow-trainer").get_by_label("no clipping", exact=True).check()
    press(page, "beside a sound flow")
    press(page, "Another seed")
    frame = page.locator("flow-trainer .pane").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 60, steps=5)
    page.mouse.up()
    frame.focus()
    for key in ("ArrowRight", "ArrowUp", " "):
        frame.press(key)
    state, points = page.evaluate(f"[{IT}.state, {IT}.points]")
    assert state == {
        "data": "own",
        "model": "realnvp",
        "base": "logistic",
        "couplings": 4,
        "width": 16,
        "rate": 0.003,
        "seed": 2,
        "broken": ["clipping"],
        "beside": False,
        "own": state["own"],
    }
    assert 4 <= len(points) <= 7
    assert points[-1] == pytest.approx([0.2, 0.2], abs=0.06)
    extent = 3.6 * (2 * 40 / box["width"] - 1)
    assert points[0] == pytest.approx([extent, -extent], abs=0.06)
    address = page.url.split("#")[1]
    go(page, "train=moons")
    go(page, address)
    assert page.evaluate(f"[{IT}.state, {IT}.points]") == [state, points]
    steps(page, 100)
    assert shown(page)[0]["nll"] < 3
    press(page, "wipe")
    assert "Draw points" in page.locator("flow-trainer .now").inner_text()
    assert page.locator("flow-trainer").get_by_role("button", name="Train", exact=True).is_disabled()


def test_a_link_starts_the_training(page: Page) -> None:
    go(page, "train=moons")
    page.locator('a[href="#train=moons&broken=mask"]').click()
    page.wait_for_function(f"{IT}.steps > 20 && {IT}.names.length === 2")
    assert 0 <= page.evaluate(f"{IT}.frame.getBoundingClientRect().top") < 400
    press(page, "Pause")


def test_nonsense_in_an_address_is_ignored(page: Page) -> None:
    go(page, "train=constructor&model=__proto__&couplings=3&rate=x&seed=-7&broken=nothing,tanh,&own=!&beside=0")
    state = page.evaluate(f"{IT}.state")
    assert (state["data"], state["model"], state["couplings"], state["rate"], state["seed"]) == (
        "moons",
        "nice",
        8,
        0.01,
        0,
    )
    assert page.evaluate(f"{IT}.broken") == []


def test_a_trained_flow_is_saved_read_by_the_library_and_opened_again(page: Page, tmp_path: Path) -> None:
    for model in ("nice", "realnvp"):
        go(page, f"train=moons&model={model}&base=logistic")
        steps(page, 60)
        with page.expect_download() as download:
            press(page, "save the flow")
        file = tmp_path / f"{model}.json"
        download.value.save_as(file)
        flow = export.from_json(json.loads(file.read_text()))
        assert len(flow.chain) == (9 if model == "nice" else 8)
        points = torch.tensor(page.evaluate(f"[...{IT}.flows[0].points]")).view(2, -1).T
        latents = torch.tensor(page.evaluate(f"[...{IT}.flows[0].latents]")).view(2, -1).T
        assert (flow.encode(points) - points).abs().max() > 0.1
        torch.testing.assert_close(flow.encode(points), latents, rtol=0.02, atol=0.02)  # float16
        before = shown(page)[0]["nll"]
        go(page, "train=moons")
        page.locator("flow-trainer input[type=file]").set_input_files(file)
        page.wait_for_function(f"{IT}.opened && {IT}.flows[0].nll !== undefined")
        assert shown(page)[0]["nll"] == pytest.approx(before, abs=0.15)  # other points
        steps(page, 150)
        assert shown(page)[0]["nll"] < before + 0.1  # the first steps of a new optimizer are large
        assert "train=" not in page.url
    # The other way round: a flow of the library's, with two hidden layers.
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(export.to_json(models.realnvp_points(2, couplings=4, hidden=10, depth=2))))
    page.locator("flow-trainer input[type=file]").set_input_files(theirs)
    page.wait_for_function(f"{IT}.opened?.name === 'theirs.json' && {IT}.flows[0].nll !== undefined")
    before = shown(page)[0]["nll"]
    steps(page, 50)
    assert shown(page)[0]["nll"] < before - 0.2
    press(page, "look inside the flow")
    page.wait_for_function("document.querySelector('flow-playground').opened")
    assert page.evaluate("document.querySelector('flow-playground').flow.layers.length") == 4


def test_what_the_library_cannot_read_is_not_saved(page: Page, tmp_path: Path) -> None:
    alert = page.locator("flow-trainer [role=alert]")
    for address, complaint in {
        "train=moons&broken=mask": "kind is none of scaling, additive, affine",
        "train=moons&model=realnvp&broken=tanh": "no affine coupling without a tanh",
    }.items():
        go(page, address)
        press(page, "save the broken flow")
        alert.get_by_text(complaint).wait_for()
    (tmp_path / "none.json").write_text("{}")
    page.locator("flow-trainer input[type=file]").set_input_files(tmp_path / "none.json")
    alert.get_by_text("none.json holds no flow that can be trained: dims is no positive integer").wait_for()


def test_a_run_that_ends_is_told(page: Page) -> None:
    go(page, "train=moons&model=realnvp&broken=tanh,clipping")
    steps(page, 60)
    assert (
        "broken stopped at step 49, as the loss was no finite number" in page.locator("flow-trainer .now").inner_text()
    )
    assert "broken (step 49)" in page.locator("flow-trainer table").inner_text()
    press(page, "beside a sound flow")
    page.wait_for_function(f"{IT}.flows.length === 1 && {IT}.flows[0].density")
    press(page, "Train")
    page.locator("flow-trainer").get_by_role("button", name="Train", exact=True, disabled=True).wait_for()
    assert "stopped at step 49" in page.locator("flow-trainer [role=status]").inner_text()


def test_less_motion_means_fewer_pictures(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    go(page, "train=gaussians&broken=")
    press(page, "Train")
    pictures = page.evaluate(
        f"""() => new Promise((done) => {{
          const it = {IT};
          let pictures = 0;
          const receive = it.receive.bind(it);
          it.receive = (data) => {{ pictures += 1; receive(data); }};
          setTimeout(() => {{ delete it.receive; done(pictures); }}, 1500);
        }})"""
    )
    press(page, "Pause")
    page.emulate_media(reduced_motion="no-preference")
    assert 1 <= pictures <= 2


def test_an_element_that_leaves_stops_its_worker_and_can_come_back(page: Page) -> None:
    go(page, "train=moons")
    press(page, "Train")
    page.wait_for_function(f"{IT}.steps > 10")
    page.evaluate(
        f"window.gone = {IT}; window.parent_ = gone.parentNode; window.next_ = gone.nextSibling; gone.remove()"
    )
    assert page.evaluate("[gone.worker, gone.running]") == [None, False]
    page.evaluate("parent_.insertBefore(gone, next_)")
    page.locator("flow-trainer").scroll_into_view_if_needed()
    page.wait_for_function(f"{IT}.worker && {IT}.flows[0].density")
    assert page.evaluate(f"[{IT}.state.data, {IT}.steps]") == ["moons", 0]
    steps(page, 3)


def test_without_scripts_there_is_a_picture_of_training(book: Path, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "chapters" / "playground.html").as_uri())
    picture = page.locator("flow-trainer img")
    assert picture.is_visible()
    assert len(picture.get_attribute("alt")) > 40
    context.close()


def test_the_scripts_are_light() -> None:
    """All of them together, without the shipped flows, in bytes."""
    assert sum(file.stat().st_size for file in SCRIPTS.glob("*.js") if file.name != "flows.js") <= 125_000
