"""Tests of the playground: its JavaScript agrees with PyTorch, and mouse, keyboard and touch work."""

import html
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import playground
import pytest
import torch
from mathematics import leave_out_mathematics
from playwright._impl._driver import compute_driver_executable
from playwright.sync_api import Browser, Page
from torch.distributions import MultivariateNormal

from nflows_lib import models, plotting
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments import export
from nflows_lib.flow import Flow
from nflows_lib.training import History

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "_extra" / "playground"

NODE = compute_driver_executable()[0]  # the one that Playwright brings along
CASES = [
    (name, model, without)
    for name in playground.SETS
    for model, lines in playground.LEFT_OUT.items()
    for without in lines
]
# This script reads flows and points, and prints the paths forward from the points and backward from them.
RUN = """
const vm = require("vm"), fs = require("fs");
for (const file of ["train.js", "flow.js"]) vm.runInThisContext(fs.readFileSync(`${process.argv[1]}/${file}`, "utf8"));
const { flow, points } = JSON.parse(fs.readFileSync(0, "utf8"));
const it = new PlaygroundFlow(flow);
const last = it.layers.length;
const middle = Math.floor(last / 2);
const columns = Float64Array.from(points[0].flatMap((_, i) => points.map((h) => h[i])));
console.log(JSON.stringify({
  forward: points.map((x) => it.path(x)),
  backward: points.map((z) => it.path(z, last)),
  between: points.map((h) => it.path(h, middle)),
  rest: [...it.flow.logProb(columns, points.length, middle).logProb],
}));
"""


def in_node(flow: dict[str, Any], points: torch.Tensor) -> dict[str, Any]:
    """What flow.js computes from the points, taken as data, as latents, and as vectors in the middle of the flow."""
    told = json.dumps({"flow": flow, "points": points.tolist()})
    ran = subprocess.run([NODE, "-e", RUN, str(SCRIPTS)], input=told, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def numbers(values: Any) -> torch.Tensor:
    """Nested lists as a tensor, in which null, JSON's form of infinity and NaN, becomes NaN."""

    def filled(value: Any) -> Any:
        return [filled(inner) for inner in value] if isinstance(value, list) else math.nan if value is None else value

    return torch.tensor(filled(values), dtype=torch.float64)


def agree(found: Any, true: torch.Tensor) -> None:
    """Assert that two tensors agree within 1e-5, and that neither is finite where the other is not."""
    true = true.where(true.isfinite(), math.nan)
    torch.testing.assert_close(numbers(found), true, rtol=1e-5, atol=1e-5, equal_nan=True)


def compare(content: dict[str, Any], flow: Flow) -> None:
    """Compare every state, log-det and log p on the way from data, from latent, and from the middle, within 1e-5."""
    torch.manual_seed(0)
    flow = flow.double()
    points = torch.randn(100, flow.dims, dtype=torch.float64)
    found = in_node(content, points)
    last, middle = len(flow.chain), len(flow.chain) // 2
    for key, start in (("forward", 0), ("backward", last), ("between", middle)):
        with torch.no_grad():
            x = points
            for layer in reversed(flow.chain[:start].layers):
                x = layer.inverse(x)
            states, log_dets = [x], []
            for layer in flow.chain:
                z, log_det = layer(states[-1])
                states.append(z)
                log_dets.append(log_det)
            states, log_dets = torch.stack(states, 1), torch.stack(log_dets, 1)
            log_p = flow.base.log_prob(states[:, -1]) + log_dets.sum(1)
        paths = {name: [path[name] for path in found[key]] for name in found[key][0]}
        agree(paths["states"], states)
        agree(paths["logDets"], log_dets)
        agree(paths["logDet"], log_dets.sum(1))
        agree(paths["logBase"], flow.base.log_prob(states[:, -1]))
        agree(paths["logProb"], log_p)
        assert states.isfinite().all(2).all(1).double().mean() > 0.5  # and most are
        if key == "between":
            agree(found["rest"], log_p - log_dets[:, :middle].sum(1))


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return playground.read()


@pytest.mark.parametrize(("name", "model", "without"), CASES)
def test_the_page_computes_what_pytorch_does(shipped: dict[str, Any], name: str, model: str, without: str) -> None:
    content = shipped[name]["flows"][model][without]
    compare(content, playground.from_json(content))


@pytest.mark.parametrize(
    "flow",
    [
        models.nice(3, couplings=3, hidden=5, depth=2),
        models.realnvp_points(4, couplings=3, hidden=6, activation=torch.nn.Tanh),
    ],
    ids=["logistic, relu, three dimensions", "tanh, four dimensions"],
)
def test_so_it_does_for_what_else_can_be_exported(flow: Flow) -> None:
    torch.manual_seed(0)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    content = export.to_json(flow)
    compare(content, export.from_json(content))


@pytest.mark.parametrize(("name", "model", "without"), CASES)
def test_each_flow_is_as_good_as_the_page_says(shipped: dict[str, Any], name: str, model: str, without: str) -> None:
    content = shipped[name]["flows"][model][without]
    torch.manual_seed(4)
    log_p = log_likelihoods(playground.from_json(content), playground.SETS[name][1](20_000))
    error = log_p.std().item() / 20_000**0.5
    assert content["log_prob"] == pytest.approx(log_p.mean().item(), abs=0.01 + 6 * error)
    built, shown = playground.build(model, without), playground.from_json(content)
    masks = [[layer.mask.tolist() for layer in flow.chain if hasattr(layer, "mask")] for flow in (built, shown)]
    assert masks[0] == masks[1]
    x = torch.randn(5, 2)
    for layer in built.chain[:8]:
        torch.nn.init.normal_(layer.network.layers[-1].bias)
        assert torch.equal(layer(x)[0] == x, layer.mask.expand(5, 2))  # the layer does what its mask says
    assert built.summary().splitlines()[1:-1] == shown.summary().splitlines()[1:-1]


def test_the_learning_rate_is_halved_until_the_loss_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def fit(*_: Any, lr: float, **__: Any) -> None:
        rates.append(lr)
        if len(rates) < 3:
            raise playground.NonFiniteLoss(History(loss=[math.inf]))

    monkeypatch.setattr(playground, "fit", fit)
    assert playground.trained("moons", "nice", "nothing")[1] == rates[-1]
    assert rates == [0.01, 0.005, 0.0025]


def test_what_is_left_out_is_left_out(shipped: dict[str, Any]) -> None:
    for entry in shipped.values():
        flows = entry["flows"]
        assert [layer["kind"] for layer in flows["nice"]["nothing"]["layers"]] == ["additive"] * 8 + ["scaling"]
        assert [layer["kind"] for layer in flows["nice"]["scaling"]["layers"]] == ["additive"] * 8
        for model in ("nice", "realnvp"):
            couplings = [layer for layer in flows[model]["alternation"]["layers"] if "passes" in layer]
            assert [layer["passes"] for layer in couplings] == [[1, 0]] * 8
        assert all("gain" in layer for layer in flows["realnvp"]["nothing"]["layers"])
        assert not any("gain" in layer for layer in flows["realnvp"]["tanh"]["layers"])


def test_what_the_page_says_of_the_failures(shipped: dict[str, Any]) -> None:
    """Every claim of the page and of the playground's stories that a number can decide is true."""
    log_p = {
        name: {m: {w: f["log_prob"] for w, f in fs.items()} for m, fs in e["flows"].items()}
        for name, e in shipped.items()
    }
    for models_of in log_p.values():
        assert models_of["nice"]["scaling"] < models_of["nice"]["nothing"] - 0.25
    for name in ("moons", "spiral"):
        for found in log_p[name].values():
            assert found["alternation"] < found["nothing"] - 0.8
    # Nothing is lost on the thin curve, whose first coordinate is normal as it is.
    assert log_p["curve"]["realnvp"]["alternation"] == pytest.approx(log_p["curve"]["realnvp"]["nothing"], abs=0.02)
    slower = {name for name, entry in shipped.items() if entry["flows"]["realnvp"]["tanh"]["lr"] < 0.01}
    assert slower == {"moons", "circles"}
    # At the point of the moons with the largest log p, NICE's latent is 0 and RealNVP's is not.
    for model, most in (("nice", 0.05), ("realnvp", 2.0)):
        flow = playground.from_json(shipped["moons"]["flows"][model]["nothing"])
        pane = plotting.grid(3.4, 240)
        best = pane[flow.log_prob(pane).argmax()]
        assert flow.encode(best[None]).norm() < most
        assert (flow.encode(best[None]).norm() > 0.5) == (model == "realnvp")
    assert best.tolist() == pytest.approx([-0.9, 1.1], abs=0.05)
    assert flow.decode(torch.zeros(1, 2)).squeeze().tolist() == pytest.approx([0.25, 0.46], abs=0.01)
    # On the circles NICE does no better than the normal density that fits them best.
    points = playground.SETS["circles"][1](20_000)
    best_normal = MultivariateNormal(points.mean(0), points.T.cov()).log_prob(points).mean().item()
    assert log_p["circles"]["nice"]["nothing"] == pytest.approx(best_normal, abs=0.05)
    assert log_p["spiral"]["nice"]["nothing"] > log_p["spiral"]["realnvp"]["nothing"]
    assert log_p["moons"]["realnvp"]["tanh"] == pytest.approx(log_p["moons"]["realnvp"]["nothing"], abs=0.02)
    # Without the tanh, much of the pane has no finite image.
    pane = plotting.grid(3.4, 60)
    for name in slower:
        for without, least, most in (("tanh", 0.15, 0.6), ("nothing", 0.0, 0.0)):
            latent = playground.from_json(shipped[name]["flows"]["realnvp"][without]).encode(pane)
            assert least <= (~latent.isfinite().all(1)).double().mean() <= most


def test_every_link_leads_to_a_state_that_there_is(shipped: dict[str, Any]) -> None:
    texts = [
        path.read_text(encoding="utf-8") for path in (ROOT / "chapters").iterdir() if path.suffix in (".md", ".ipynb")
    ]
    links = [link for text in texts for link in re.findall(r'href=\\?"(?:playground.html)?#(data=[^"\\]+)', text)]
    assert len(links) >= 8
    for link in links:
        state = dict(parse_qsl(html.unescape(link), strict_parsing=True))
        needed = {"data", "model", "without", "layer"}
        assert needed <= set(state) <= needed | {"grid", "pen", "samples"}
        flow = shipped[state["data"]]["flows"][state["model"]][state["without"]]
        assert int(state["layer"]) in (0, len(flow["layers"]))
        assert state.get("grid", "data") in ("data", "latent")


def test_the_points_are_drawn_from_the_set_that_is_named(shipped: dict[str, Any]) -> None:
    assert {name: entry["title"] for name, entry in shipped.items()} == {n: s[0] for n, s in playground.SETS.items()}
    for name, (_, draw) in playground.SETS.items():
        torch.manual_seed(3)
        points = export.decode(shipped[name]["points"]).view(-1, 2)
        torch.testing.assert_close(points, draw(playground.SHOWN), rtol=1e-2, atol=1e-2)


def test_the_flows_are_light() -> None:
    assert playground.FILE.stat().st_size <= 60_000


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(plain_site: str, opened: Callable[..., AbstractContextManager[Page]]) -> Iterator[Page]:
    """The playground's page."""
    with opened(f"{plain_site}/chapters/playground.html", f"{plain_site}/", "data:") as page:
        yield page


@pytest.fixture
def fresh(page: Page) -> Page:
    """The page with the playground in its first state: an address puts away all that a test before has done."""
    go(page, "data=moons&model=realnvp&without=nothing&layer=0")
    page.locator("flow-playground canvas").first.scroll_into_view_if_needed()
    return page


IT = "document.querySelector('flow-playground')"


def go(page: Page, address: str) -> None:
    """Follow a link to a state of the playground."""
    page.evaluate(
        """address => new Promise((done) => {
             history.replaceState(null, "", "#");
             addEventListener("hashchange", () => done(), { once: true });
             location.hash = address;
           })""",
        address,
    )


def hand_over(page: Page, content: Any, name: str = "own.json") -> None:
    """Open a flow on the page without writing a file to the disk."""
    page.evaluate(
        f"([content, name]) => {IT}.open(new File([JSON.stringify(content)], name))",
        [content, name],
    )


def after(flow: Flow, layers: int, x: Any) -> torch.Tensor:
    """The positions of points of the data after a number of layers."""
    x = torch.as_tensor(x, dtype=torch.float32)
    with torch.no_grad():
        for layer in flow.chain[:layers]:
            x, _ = layer(x)
    return x


def values(page: Page) -> dict[str, list[float]]:
    """The numbers in the fields for x and z."""
    found = {}
    for letter in "xz":
        fields = [page.get_by_label(f"{letter}{i}", exact=True) for i in "₁₂"]
        found[letter] = [float(field.input_value()) for field in fields]
    return found


def expected_latent(
    shipped: dict[str, Any], x: list[float], model: str = "realnvp", without: str = "nothing"
) -> list[float]:
    flow = playground.from_json(shipped["moons"]["flows"][model][without])
    return flow.encode(torch.tensor([x])).squeeze(0).tolist()


def drag(page: Page, pane: int, to: tuple[float, float]) -> None:
    """Drag the pane's point to a place, given as fractions of the pane's width and height."""
    handle = page.locator("flow-playground .handle").nth(pane).bounding_box()
    canvas = page.locator("flow-playground canvas").nth(pane).bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(canvas["x"] + to[0] * canvas["width"], canvas["y"] + to[1] * canvas["height"], steps=5)
    page.mouse.up()


def test_a_point_dragged_in_the_data_moves_its_image(fresh: Page, shipped: dict[str, Any]) -> None:
    drag(fresh, 0, (0.25, 0.5))
    now = values(fresh)
    assert now["x"][0] < -1
    assert now["x"][1] == pytest.approx(0, abs=0.05)
    assert now["z"] == pytest.approx(expected_latent(shipped, now["x"]), abs=2e-3)


def test_a_point_dragged_in_the_latent_moves_its_image(fresh: Page, shipped: dict[str, Any]) -> None:
    fresh.get_by_label("layers passed").press("End")
    fresh.wait_for_timeout(500)
    drag(fresh, 1, (0.6, 0.4))
    now = values(fresh)
    assert min(now["z"]) > 0.2
    assert expected_latent(shipped, now["x"]) == pytest.approx(now["z"], abs=2e-2)  # x is shown with four digits


def test_the_slider_steps_through_the_layers(fresh: Page) -> None:
    slider = fresh.get_by_label("layers passed")
    title = fresh.locator("flow-playground .title").nth(1)
    before = fresh.locator("flow-playground canvas").nth(1).screenshot()
    for k in (1, 2, 3):
        slider.press("ArrowRight")
        assert title.inner_text() == f"after layer {k} of 8: h"
    fresh.wait_for_timeout(600)
    assert fresh.locator("flow-playground canvas").nth(1).screenshot() != before
    assert slider.get_attribute("aria-valuetext") == "3 of 8"
    slider.press("End")
    assert "latent z" in title.inner_text()
    assert "layer=8" in fresh.url


def test_arrow_keys_move_a_point(fresh: Page, shipped: dict[str, Any]) -> None:
    before = values(fresh)
    handle = fresh.locator("flow-playground .handle").first
    handle.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        handle.press(key)
    now = values(fresh)
    assert [b - a for a, b in zip(before["x"], now["x"], strict=True)] == pytest.approx([0.2, 0.1], abs=1e-3)
    assert now["z"] == pytest.approx(expected_latent(shipped, now["x"]), abs=2e-3)
    assert "arrow keys" in handle.get_attribute("aria-label")
    handle.press("Shift+ArrowDown")
    assert values(fresh)["x"][1] == pytest.approx(now["x"][1] - 0.01, abs=1e-3)


def test_a_point_can_be_typed_and_is_spoken(fresh: Page, shipped: dict[str, Any]) -> None:
    fresh.get_by_label("x₁", exact=True).fill("1.25")
    fresh.get_by_label("x₂", exact=True).fill("-0.5")
    assert values(fresh)["z"] == pytest.approx(expected_latent(shipped, [1.25, -0.5]), abs=2e-3)
    flow = playground.from_json(shipped["moons"]["flows"]["realnvp"]["nothing"])
    log_p = flow.log_prob(torch.tensor([[1.25, -0.5]])).item()
    fresh.wait_for_timeout(700)
    spoken = fresh.locator("flow-playground [role=status]").inner_text().replace("−", "-")
    assert f"log p {log_p:.2f}" in spoken
    shown = fresh.locator("flow-playground").get_by_text("log p(x) =").inner_text().replace("−", "-")
    assert f"\n{log_p:.2f} nats =" in shown


def test_a_failure_is_switched_on(fresh: Page, shipped: dict[str, Any]) -> None:
    """A failure of one model is not offered for the other model."""
    fresh.get_by_label("NICE", exact=True).check()
    assert fresh.get_by_label("tanh", exact=True).is_hidden()
    fresh.get_by_label("scaling", exact=True).check()
    drag(fresh, 0, (0.7, 0.7))
    now = values(fresh)
    assert now["z"] == pytest.approx(expected_latent(shipped, now["x"], "nice", "scaling"), abs=2e-3)
    told = fresh.locator("flow-playground").get_by_text("log p(x) =").inner_text()
    assert re.search(r"nats = −\d+\.\d\d \+ 0\.00$", told)  # the log-det
    fresh.get_by_label("alternation", exact=True).check()
    drag(fresh, 0, (0.3, 0.7))
    now = values(fresh)
    flow = playground.from_json(shipped["moons"]["flows"]["nice"]["alternation"])
    assert now["z"][0] == pytest.approx(now["x"][0] * flow.chain[-1].log_scale[0].exp().item(), abs=2e-3)


@pytest.mark.parametrize("name", playground.SETS)
def test_every_set_can_be_chosen(fresh: Page, name: str) -> None:
    before = fresh.locator("flow-playground canvas").first.screenshot()
    fresh.get_by_label(playground.SETS[name][0], exact=True).check()
    assert f"data={name}" in fresh.url
    assert (fresh.locator("flow-playground canvas").first.screenshot() != before) == (name != "moons")


def test_an_address_brings_its_state(fresh: Page) -> None:
    fresh.evaluate("location.hash = '#data=curve&model=realnvp&without=tanh&layer=8'")
    for label in ("a thin curve", "RealNVP", "tanh"):
        assert fresh.get_by_label(label, exact=True).is_checked()
    assert "latent z" in fresh.locator("flow-playground .title").nth(1).inner_text()


def test_what_is_drawn_stays_until_it_is_wiped(fresh: Page) -> None:
    clean = fresh.locator("flow-playground canvas").nth(1).screenshot()
    fresh.get_by_role("button", name="pen", exact=True).click()
    fresh.locator("flow-playground .title").first.scroll_into_view_if_needed()
    box = fresh.locator("flow-playground canvas").first.bounding_box()
    fresh.mouse.move(box["x"] + 30, box["y"] + 30)
    fresh.mouse.down()
    fresh.mouse.move(box["x"] + 250, box["y"] + 60, steps=10)
    fresh.mouse.up()
    fresh.mouse.move(0, 0)
    assert fresh.locator("flow-playground canvas").nth(1).screenshot() != clean
    fresh.get_by_role("button", name="wipe", exact=True).click()
    assert fresh.locator("flow-playground canvas").nth(1).screenshot() == clean


@pytest.mark.parametrize(
    ("control", "key", "kept"),
    [
        ("button:text-is('wipe')", "Enter", 0),
        ("input[value=circles]", "Space", 1),
        ('a[href^="#data=circles"]', "Enter", 0),
        ("button:text-is('pen')", "Enter", 1),
    ],
    ids=["wipe", "another set", "a link", "no pen"],
)
def test_a_key_in_the_middle_of_a_stroke_does_no_harm(fresh: Page, control: str, key: str, kept: int) -> None:
    """A stroke ends when it is wiped or when another flow is chosen, and the next stroke is drawn as before."""
    trouble: list[str] = []
    fresh.on("pageerror", lambda error: trouble.append(str(error)))

    def move(x: float) -> None:
        box = fresh.locator("flow-playground canvas").first.bounding_box()
        fresh.mouse.move(box["x"] + x, box["y"] + 40)

    fresh.get_by_role("button", name="pen", exact=True).click()
    fresh.locator("flow-playground .title").first.scroll_into_view_if_needed()
    move(40)
    fresh.mouse.down()
    move(80)
    fresh.locator(control).first.evaluate("control => control.focus({ preventScroll: true })")
    fresh.keyboard.press(key)
    before = fresh.evaluate(f"{IT}.strokes")
    move(120)
    fresh.mouse.up()
    after = fresh.evaluate(f"{IT}.strokes")
    assert len(before) == len(after) == kept
    assert (before == after) == (control != "button:text-is('pen')")  # without the pen, this stroke is still drawn
    fresh.evaluate(f"() => {{ {IT}.state.pen = true; }}")
    move(60)
    fresh.mouse.down()
    move(100)
    fresh.mouse.up()
    assert fresh.evaluate(f"{IT}.lines.map((line) => line.length > 1)") == [True] * (kept + 1)
    assert not trouble


def coarse(page: Page, lines: list[list[list[list[float]]]]) -> float:
    """The share of line pieces, in any layer's pane, that are longer than a few pixels."""
    extents = torch.tensor(page.evaluate("document.querySelector('flow-playground').extents"))
    found = []
    for line in lines:
        states = torch.tensor(line) / extents[:, None]  # (points, layers, 2), the pane is from -1 to 1
        inside = (states.abs() < 1).all(2)
        found.append((states.diff(dim=0).norm(dim=2) > 0.035)[inside[1:] | inside[:-1]])
    return torch.cat(found).float().mean().item()


def test_what_is_drawn_is_smooth_in_every_layer_and_closes(fresh: Page) -> None:
    """A few points of a stroke become a line that is fine enough for every layer, with its ends joined."""
    fresh.get_by_role("button", name="pen", exact=True).click()
    fresh.locator("flow-playground .title").first.scroll_into_view_if_needed()
    box = fresh.locator("flow-playground canvas").first.bounding_box()
    x, y, r = box["x"] + 0.7 * box["width"], box["y"] + 0.6 * box["height"], 0.2 * box["width"]
    corners = [(x + r * math.cos(t / 12 * math.tau), y + 0.7 * r * math.sin(t / 12 * math.tau)) for t in range(12)]
    fresh.mouse.move(*corners[0])
    fresh.mouse.down()
    for corner in [*corners[1:], (corners[0][0] + 3, corners[0][1] + 3)]:
        fresh.mouse.move(*corner)
    fresh.mouse.up()
    (line,) = fresh.evaluate("document.querySelector('flow-playground').lines")
    assert line[0] == line[-1]
    assert coarse(fresh, [line]) < 0.01


def test_the_grid_is_smooth_in_every_layer(fresh: Page) -> None:
    fresh.evaluate("location.hash = '#data=circles&model=realnvp&without=nothing&layer=8&grid=latent'")
    fresh.wait_for_function("document.querySelector('flow-playground').state.data === 'circles'")
    # As one text, since Playwright takes long over many numbers. JSON writes null where there is no finite number.
    grid = json.loads(fresh.evaluate(f"JSON.stringify({IT}.grid)").replace("null", "NaN"))
    assert len(grid) == 26
    assert coarse(fresh, grid) < 0.01


def test_a_link_works_again_and_puts_everything_in_its_place(fresh: Page) -> None:
    link = fresh.locator('a[href^="#data=moons"]', has_text="Leave out the alternation")
    for _ in range(2):
        fresh.get_by_role("button", name="pen", exact=True).click()
        fresh.get_by_role("button", name="grid straight in the latent").click()
        fresh.locator("flow-playground").evaluate("it => it.strokes.push([[0, 0], [1, 1]])")
        link.scroll_into_view_if_needed()
        link.click()
        fresh.wait_for_function("!document.querySelector('flow-playground').state.pen")
        state = fresh.locator("flow-playground").evaluate("it => ({ ...it.state, strokes: it.strokes.length })")
        assert (state["without"], state["layer"], state["gridOn"], state["strokes"]) == ("alternation", 8, "data", 0)
        top = fresh.evaluate("document.querySelector('flow-playground').getBoundingClientRect().top")
        assert 0 <= top < 200  # in view


def test_sampling_goes_from_noise_to_data(fresh: Page) -> None:
    hand_over(fresh, export.to_json(models.realnvp_points(2, couplings=3, hidden=4)))  # a second per layer
    fresh.wait_for_function(f"{IT}.last === 3")
    fresh.get_by_role("button", name="Sample", exact=True).click()
    state = "(it => [it.state.layer, it.drawn.length])(document.querySelector('flow-playground'))"
    assert fresh.evaluate(state)[1] > 150
    fresh.wait_for_function(f"{state}[0] === 0")
    fresh.get_by_role("button", name="Play", exact=True).wait_for()


def test_a_hand_stops_the_play(fresh: Page) -> None:
    for stop in (
        lambda: fresh.get_by_label("one layer on").click(),
        lambda: fresh.get_by_label("two circles", exact=True).check(),
        lambda: fresh.get_by_role("button", name="Stop", exact=True).click(),
    ):
        fresh.get_by_role("button", name="Play", exact=True).click()
        stop()
        assert fresh.get_by_role("button", name="Play", exact=True).is_visible()
        assert fresh.evaluate("document.querySelector('flow-playground').playing") is None


def test_a_choice_is_spoken(fresh: Page) -> None:
    fresh.get_by_label("tanh", exact=True).check()
    fresh.wait_for_timeout(700)
    assert "The log-scale is what the network says" in fresh.locator("flow-playground [role=status]").inner_text()


def test_a_flow_of_ones_own_is_opened(fresh: Page, tmp_path: Path) -> None:
    """The page's own code writes the file; a file without a flow is refused with a message."""
    text = (ROOT / "chapters" / "playground.md").read_text(encoding="utf-8")
    flow = models.realnvp_points(2, couplings=4, hidden=16)
    assert "models.realnvp_points(2, couplings=4, hidden=16)" in text
    (tmp_path / "flow.json").write_text(json.dumps(export.to_json(flow)))
    fresh.locator("flow-playground input[type=file]").set_input_files(tmp_path / "flow.json")
    fresh.wait_for_function("document.querySelector('flow-playground').last === 4")
    fresh.get_by_label("x₁", exact=True).fill("0.5")
    now = values(fresh)
    assert now["z"] == pytest.approx(now["x"], abs=1e-6)  # an untrained flow is the identity map
    assert fresh.evaluate("document.querySelector('flow-playground').points.length") > 100  # samples from it
    good = json.loads((tmp_path / "flow.json").read_text())
    wrong = {
        "[1, 2]": "dims is no positive integer",
        "null": "dims is no positive integer",
        json.dumps(good | {"layers": []}): "it has no layers",
        json.dumps(good | {"base": "constructor"}): "base is none of normal, logistic",
        json.dumps(
            {"dims": 2, "base": "normal", "layers": [{"kind": "scaling", "log_scale": [0.1]}]}
        ): "log_scale is not 2",
        json.dumps(good | {"layers": [good["layers"][0] | {"weights": "AAAA"}]}): "weights are 1 numbers",
        json.dumps(good | {"layers": [good["layers"][0] | {"weights": "?"}]}): "weights are not in base64",
        json.dumps(export.to_json(models.nice(3))): "expected points in the plane, got 3 dimensions",
    }
    for text, complaint in wrong.items():
        (tmp_path / "other.json").write_text(text)
        fresh.locator("flow-playground input[type=file]").set_input_files(tmp_path / "other.json")
        fresh.get_by_role("alert").get_by_text(f"other.json holds no flow that can be shown: {complaint}").wait_for()
    assert fresh.evaluate("document.querySelector('flow-playground').last") == 4  # what was there stays


def test_a_finger_drags_the_point_and_scrolls_beside_it(book: Path, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    leave_out_mathematics(page)
    page.goto((book / "chapters" / "playground.html").as_uri())
    handle = page.locator("flow-playground .handle").first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert min(box["width"], box["height"]) >= 44
    before = values(page)
    devtools = context.new_cdp_session(page)
    x, y = box["x"] + 22, box["y"] + 22

    def touch(kind: str, *at: float) -> None:
        points = [{"x": at[0], "y": at[1]}] if at else []
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", x, y)
    for i in range(1, 6):
        touch("touchMove", x - 12 * i, y + 12 * i)
    touch("touchEnd")
    after = values(page)
    assert after["x"][0] < before["x"][0] - 0.5
    assert after["x"][1] < before["x"][1] - 0.5
    page.locator("flow-playground canvas").first.scroll_into_view_if_needed()
    canvas = page.locator("flow-playground canvas").first.bounding_box()
    x, y, top = canvas["x"] + 40, canvas["y"] + canvas["height"] - 40, page.evaluate("scrollY")
    touch("touchStart", x, y)
    for i in range(1, 8):
        touch("touchMove", x, y - 20 * i)
    touch("touchEnd")
    page.wait_for_function(f"scrollY > {top} + 50", timeout=5000)
    assert values(page)["x"] == after["x"]
    page.locator("flow-playground canvas").first.scroll_into_view_if_needed()
    canvas = page.locator("flow-playground canvas").first.bounding_box()
    page.touchscreen.tap(canvas["x"] + 40, canvas["y"] + 40)  # a tap brings the point
    page.wait_for_function(f"{IT}.state.x[0] < -2 && {IT}.state.x[1] > 2", timeout=5000)
    context.close()


def test_with_reduced_motion_nothing_moves_by_itself(fresh: Page) -> None:
    fresh.emulate_media(reduced_motion="reduce")
    fresh.get_by_label("layers passed").press("End")
    shown = fresh.evaluate(f"{IT}.shown")
    fresh.emulate_media(reduced_motion="no-preference")
    assert shown == 8


def test_the_shading_is_the_density_of_the_flow_that_is_chosen(page: Page, shipped: dict[str, Any]) -> None:
    """The shading is that of the position that is shown, the right way up."""
    for model, k in (("realnvp", 0), ("nice", 0), ("realnvp", 5)):
        go(page, f"data=moons&model={model}&without=nothing&layer={k}")
        found = page.evaluate(
            f"""() => {{
              const {{ heats, extents, state }} = {IT};
              const {{ picture }} = heats[state.layer];
              const pixels = picture.getContext("2d").getImageData(0, 0, picture.width, picture.height).data;
              return {{ extent: extents[state.layer], alpha: Array.from(pixels).filter((_, i) => i % 4 === 3) }};
            }}"""
        )
        flow = playground.from_json(shipped["moons"]["flows"][model]["nothing"])
        rest = flow[k:]
        across = math.isqrt(len(found["alpha"]))
        line = found["extent"] * (2 * (torch.arange(across) + 0.5) / across - 1)
        p = rest.log_prob(torch.cartesian_prod(-line, line).flip(1)).exp()
        alpha = 190 * (p / p.sort().values[int(0.99 * len(p))]).clamp(max=1).sqrt()
        torch.testing.assert_close(torch.tensor(found["alpha"]).float(), alpha, rtol=0, atol=2)


def test_a_drag_a_key_and_the_pen_act_on_the_plane_that_is_shown(page: Page, shipped: dict[str, Any]) -> None:
    """The plane is that after 5 of 8 layers, whose pane is wider than the data's."""
    go(page, "data=circles&model=realnvp&without=nothing&layer=5")
    flow = playground.from_json(shipped["circles"]["flows"]["realnvp"]["nothing"])
    extent = page.evaluate(f"{IT}.extents[5]")
    there = [0.2 * extent, 0.4 * extent]
    drag(page, 1, (0.6, 0.3))
    assert after(flow, 5, page.evaluate(f"[{IT}.state.x]"))[0].tolist() == pytest.approx(there, abs=0.05)
    page.locator("flow-playground .handle").nth(1).press("ArrowRight")
    now = page.evaluate(f"{IT}.path.states[5]")
    assert now == pytest.approx([there[0] + 0.1, there[1]], abs=0.05)
    page.get_by_role("button", name="pen", exact=True).click()
    page.locator("flow-playground .title").first.scroll_into_view_if_needed()
    drag(page, 1, (0.4, 0.6))
    page.get_by_role("button", name="pen", exact=True).click()
    line = after(flow, 5, page.evaluate(f"{IT}.strokes[0]"))
    assert line[-1].tolist() == pytest.approx([-0.2 * extent, -0.2 * extent], abs=0.05)
    assert page.evaluate(f"{IT}.path.states[5]") == now
    page.get_by_role("button", name="wipe", exact=True).click()


def test_the_words_and_the_bars_are_the_layers(page: Page, shipped: dict[str, Any]) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=3")
    flow = playground.from_json(shipped["moons"]["flows"]["realnvp"]["nothing"])
    chain = list(flow.chain)
    x = page.evaluate(f"[{IT}.state.x]")
    added = [layer(after(flow, k, x))[1].item() for k, layer in enumerate(chain)]
    told = page.locator("flow-playground .now")
    for k in (3, 4):
        page.locator("flow-playground .bars span").nth(k - 1).click(position={"x": 3, "y": 3})
        moves = "h₂" if chain[k - 1].mask[0] else "h₁"
        assert f"Layer {k}, coupling: it moves and stretches {moves}" in told.inner_text()
        does = "adds" if added[k - 1] > 0 else "takes"
        assert f"It {does} {abs(added[k - 1]):.2f} nats" in told.inner_text()
    bars = page.locator("flow-playground .bars i")
    assert [bar.get_attribute("class") for bar in bars.all()] == ["down" if value < 0 else "up" for value in added]
    heights = [float(height.rstrip("%")) for height in bars.evaluate_all("all => all.map((one) => one.style.height)")]
    points = export.decode(shipped["moons"]["points"]).view(-1, 2)
    largest = max(layer(after(flow, k, points))[1].abs().max().item() for k, layer in enumerate(chain))
    assert heights == pytest.approx([50 * abs(value) / largest for value in added], abs=0.01)


def test_points_keep_their_colours_and_move_on_straight_lines(page: Page, shipped: dict[str, Any]) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=2")
    found = page.evaluate(
        f"""() => {{
          const it = {IT};
          const seen = [[], []];
          const {{ arc }} = CanvasRenderingContext2D.prototype;
          CanvasRenderingContext2D.prototype.arc = function (left, top, radius, ...rest) {{
            const size = this.canvas.clientWidth;
            const pane = seen[this.canvas === it.panes.data.canvas ? 0 : 1];
            if (radius === 2.6) pane.push({{ at: [left / size, top / size], colour: this.fillStyle }});
            return arc.call(this, left, top, radius, ...rest);
          }};
          it.shown = 2.5;
          it.draw();
          CanvasRenderingContext2D.prototype.arc = arc;
          it.settle();
          return {{ seen, extents: it.extents.slice(0, 4) }};
        }}"""
    )
    flow = playground.from_json(shipped["moons"]["flows"]["realnvp"]["nothing"])
    points = export.decode(shipped["moons"]["points"]).view(-1, 2)
    middle = (after(flow, 2, points) + after(flow, 3, points)) / 2
    extents = found["extents"]
    for pane, h, extent in zip(found["seen"], (points, middle), (extents[0], sum(extents[2:]) / 2), strict=True):
        at = torch.stack([1 + h[:, 0] / extent, 1 - h[:, 1] / extent], 1) / 2
        torch.testing.assert_close(torch.tensor([point["at"] for point in pane]), at, rtol=0, atol=1e-3)
    colours = [[point["colour"] for point in pane] for pane in found["seen"]]
    assert colours[0] == colours[1]
    assert len({*colours[0]}) > 100


def test_play_stops_at_the_last_layer_and_begins_again(page: Page) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=7")
    page.get_by_role("button", name="Play", exact=True).click()
    assert page.get_by_label("layers passed").input_value() == "8"
    page.get_by_role("button", name="Stop", exact=True).wait_for(state="detached")
    assert page.evaluate(f"[{IT}.state.layer, {IT}.shown]") == [8, 8]
    page.get_by_role("button", name="Play", exact=True).click()
    assert page.get_by_label("layers passed").input_value() == "0"
    go(page, "data=moons&model=realnvp&without=nothing&layer=3")  # a link ends it
    assert page.get_by_role("button", name="Play", exact=True).is_visible()
    page.evaluate(f"{IT}.goTo(8); {IT}.settle()")
    assert page.evaluate(f"new Promise((done) => setTimeout(() => done({IT}.shown), 100))") == 8


def test_samples_are_the_flows_own(page: Page) -> None:
    """When another flow is chosen, the samples are that flow's."""
    go(page, "data=moons&model=realnvp&without=nothing&layer=0")
    samples = page.locator("flow-playground").get_by_role("button", name="samples instead of data")
    samples.click()
    for name in ("moons", "circles"):
        page.get_by_label(playground.SETS[name][0], exact=True).check()
        assert samples.get_attribute("aria-pressed") == "true"
        z = torch.tensor(page.evaluate(f"{IT}.points.map((states) => states.at(-1))"))
        assert z.square().mean().item() == pytest.approx(1, abs=0.4)
    samples.click()
    assert page.evaluate(f"{IT}.points.map((states) => states[0])") == page.evaluate(f"{IT}.setPoints")


def test_the_shading_keeps_to_a_pane_that_widens(page: Page) -> None:
    go(page, "data=circles&model=realnvp&without=nothing&layer=5")
    page.evaluate(
        f"{{ const it = {IT}; it.drawn = it.setPoints.map((x) => x.map((v) => 2 * v)); it.follow(); it.draw(); }}"
    )
    assert page.evaluate(f"{IT}.extents[0] > 3.4 && {IT}.heats[0].extent === {IT}.extents[0]")


def test_an_address_is_followed_as_far_as_it_can_be(page: Page) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=0&grid=data")
    straight = page.get_by_role("button", name="grid straight in the latent")
    for address, model, layer, last, grid in (
        ("data=circles&model=nice&without=nothing&layer=99&grid=latent", "nice", 9, 9, "latent"),
        ("data=constructor&model=realnvp&without=nothing&layer=1", "nice", 9, 9, "latent"),
        ("data=spiral&model=toString&without=valueOf&layer=-3", "realnvp", 0, 8, "data"),
    ):
        go(page, address)
        state = page.evaluate(f"{{ const {{ last, shown, state }} = {IT}; ({{ last, shown, ...state }}); }}")
        assert [state[name] for name in ("model", "without", "layer", "shown", "last", "gridOn")] == [
            *(model, "nothing", layer, layer, last, grid)
        ]
        assert page.get_by_label("layers passed").input_value() == str(layer)
        assert straight.get_attribute("aria-pressed") == str(grid == "latent").lower()
        end = -1 if grid == "latent" else 0
        lines = page.evaluate(f"{IT}.grid.map((line) => line.map((states) => states.at({end})))")
        spans = torch.stack([torch.tensor(line).amax(0) - torch.tensor(line).amin(0) for line in lines])
        assert spans.amin(1).max() < 1e-3  # each line, across or along
        assert spans.amax(1).min() == pytest.approx(6, abs=1e-3)
    assert page.evaluate(f"{IT}.state.x") in page.evaluate(f"{IT}.setPoints")
    straight.click()
    assert page.url.endswith("grid=latent")


def test_a_flow_of_ones_own_gives_way_to_the_next_choice(page: Page, shipped: dict[str, Any]) -> None:
    story = page.locator("flow-playground .story")
    content = export.to_json(models.realnvp_points(2, couplings=4, hidden=16))
    address = "data=moons&model=realnvp&without=nothing&layer=8"
    for way in ("radio", "link"):
        go(page, address)
        # For ever on its way, from where the next flow has no layer.
        page.evaluate(
            f"""() => {{
              window.whole = requestAnimationFrame;
              window.requestAnimationFrame = (tick) => window.whole(() => tick(0));
              {IT}.goTo(0);
            }}"""
        )
        hand_over(page, content)
        assert story.inner_text() == "own.json. The points are samples from it."
        assert not page.get_by_label("two moons", exact=True).is_checked()
        assert page.url.endswith("#")
        page.wait_for_timeout(100)
        page.evaluate("() => { window.requestAnimationFrame = window.whole; }")
        assert page.evaluate(f"[{IT}.last, {IT}.state.layer, {IT}.shown]") == [4, 0, 0]
        page.get_by_label("two moons", exact=True).check() if way == "radio" else go(page, address)
        assert page.evaluate(f"{IT}.last") == 8
        assert "own.json" not in story.inner_text()
        assert page.evaluate(f"{IT}.drawn") is None


def test_a_flow_without_finite_samples_leaves_the_pane_as_it_is(page: Page) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=0")
    hand_over(page, {"dims": 2, "base": "normal", "layers": [{"kind": "scaling", "log_scale": [-999, 0]}]})
    assert page.evaluate(f"[{IT}.points.length, ...{IT}.extents, ...{IT}.state.x]") == [0, 3.4, 3.4, 0, 0]


def test_where_there_is_no_number_the_page_says_so(page: Page, shipped: dict[str, Any]) -> None:
    """Keys can still move the point, from its last place."""
    go(page, "data=moons&model=realnvp&without=tanh&layer=8")
    flow = playground.from_json(shipped["moons"]["flows"]["realnvp"]["tanh"])
    pane = plotting.grid(3.3, 40)
    lost = pane[flow.double().encode(pane.double()).isnan().any(1)][0].tolist()
    for i, value in zip("₁₂", lost, strict=True):
        page.get_by_label(f"x{i}", exact=True).fill(f"{value:.6f}")
    told = page.locator("flow-playground").get_by_text("log p(x) =")
    assert "no number nats" in told.inner_text()
    handles = page.locator("flow-playground .handle")
    assert "outside" in handles.nth(1).get_attribute("class")
    assert "outside" not in handles.nth(0).get_attribute("class")
    handles.nth(1).press("ArrowUp")
    assert page.evaluate(f"{IT}.path.states[0]") == pytest.approx(lost, abs=1e-3)
    handles.nth(0).press("ArrowUp")
    assert page.evaluate(f"{IT}.path.states[0]") == pytest.approx([lost[0], lost[1] + 0.1], abs=1e-3)
    page.evaluate(f"{IT}.moveTo({IT}.flow.path([NaN, NaN], 8))")
    assert "outside" in handles.nth(0).get_attribute("class")
    handles.nth(0).press("ArrowDown")
    assert page.evaluate(f"{IT}.path.states[0]") == pytest.approx(lost, abs=1e-3)


def test_the_story_says_what_the_line_is_worth(page: Page, shipped: dict[str, Any]) -> None:
    go(page, "data=moons&model=realnvp&without=tanh&layer=0")
    flows = shipped["moons"]["flows"]["realnvp"]
    told = page.locator("flow-playground .story").inner_text().replace("−", "-")
    assert f"Its log p is {flows['tanh']['log_prob']:.2f} nats on average" in told
    assert f"with nothing left out it is {flows['nothing']['log_prob']:.2f}." in told
    assert f"At the learning rate of the other flows, {flows['nothing']['lr']}" in told
    assert f"this flow was trained at {flows['tanh']['lr']}." in told
    page.get_by_label("alternation", exact=True).check()
    assert "learning rate" not in page.locator("flow-playground .story").inner_text()


def test_a_field_is_left_alone_while_one_types_and_filled_afterwards(page: Page) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=0")
    field = page.get_by_label("x₁", exact=True)
    field.fill("")
    field.press_sequentially("1.23456")
    assert field.input_value() == "1.23456"
    field.fill("")
    field.blur()
    assert field.input_value() == "1.235"


def test_the_panes_follow_the_theme_and_the_windows_size(page: Page) -> None:
    go(page, "data=moons&model=realnvp&without=nothing&layer=0")
    colour = f"{IT}.heats[0].colour"
    before = page.evaluate(colour)
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.evaluate("theme => document.documentElement.dataset.theme = theme", "light" if theme == "dark" else "dark")
    page.wait_for_function(f"{colour} !== '{before}'", timeout=5000)
    page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
    for size in (600, 1200):
        page.set_viewport_size({"width": size, "height": 1000})
        canvas = f"{IT}.panes.latent.canvas"
        page.wait_for_function(f"{canvas}.width === Math.round(devicePixelRatio * {canvas}.clientWidth)", timeout=5000)


def test_a_line_that_leaves_the_numbers_has_a_gap(page: Page) -> None:
    """The line does not jump across the gap, which would look like a tear."""
    go(page, "data=moons&model=realnvp&without=nothing&layer=0")
    found = page.evaluate(
        f"""() => {{
          const it = {IT};
          const calls = [];
          const pen = CanvasRenderingContext2D.prototype;
          const {{ moveTo, lineTo }} = pen;
          pen.moveTo = function (...at) {{ calls.push("move"); moveTo.apply(this, at); }};
          pen.lineTo = function (...at) {{ calls.push("line"); lineTo.apply(this, at); }};
          const whole = it.grid;
          it.grid = [[[0, 0], [1, 1], [NaN, 1], [2, 2], [3, 3]].map((h) => Array(9).fill(h))];
          it.drawPane("data", 0);
          Object.assign(pen, {{ moveTo, lineTo }});
          it.grid = whole;
          return calls;
        }}"""
    )
    assert found == ["move", "line"] * 2


def test_an_element_that_leaves_takes_its_listeners_along(fresh: Page) -> None:
    """An element that is put back works again, and nothing happens twice."""
    circles = "#data=circles&model=realnvp&without=nothing&layer=5"
    fresh.evaluate(
        f"""() => {{
          const it = window.away = {IT};
          window.place = [it.parentNode, it.nextSibling];
          window.calls = {{ goToAddress: 0, draw: 0 }};
          for (const name of Object.keys(window.calls)) {{
            const method = it[name];
            it[name] = function () {{ window.calls[name]++; return method.call(this); }};
          }}
          it.play(1);
          it.remove();
          window.calls.draw = 0;
        }}"""
    )
    away = "({ ...window.calls, data: away.state.data, playing: away.playing })"
    theme = fresh.evaluate("document.documentElement.dataset.theme")
    other = "light" if theme == "dark" else "dark"
    go(fresh, circles)
    fresh.locator('a[href^="#data=moons"]').first.evaluate("link => { link.hash = location.hash; link.click(); }")
    fresh.evaluate("theme => document.documentElement.dataset.theme = theme", other)
    fresh.wait_for_timeout(200)
    assert fresh.evaluate(away) == {"goToAddress": 0, "draw": 0, "data": "moons", "playing": None}
    fresh.evaluate("window.place[0].insertBefore(window.away, window.place[1])")
    fresh.wait_for_function("window.calls.draw > 0")  # its size is a new one
    fresh.evaluate("theme => { window.calls.draw = 0; document.documentElement.dataset.theme = theme; }", theme)
    fresh.wait_for_function("window.calls.draw > 0")
    go(fresh, circles)
    assert fresh.evaluate("[window.calls.goToAddress, away.state.data, away.state.layer]") == [1, "circles", 5]
    before = values(fresh)["x"]
    fresh.locator("flow-playground canvas").first.scroll_into_view_if_needed()
    drag(fresh, 0, (0.2, 0.3))
    assert values(fresh)["x"] != before


@pytest.fixture
def second(fresh: Page) -> Iterator[Page]:
    """The page with another playground, whose id is "second"."""
    fresh.evaluate(
        f"() => {{ const it = document.createElement('flow-playground'); it.id = 'second'; {IT}.after(it); }}"
    )
    yield fresh
    fresh.evaluate("document.getElementById('second').remove()")


def test_two_playgrounds_have_their_own_addresses(second: Page) -> None:
    chosen = """() => [...document.querySelectorAll("flow-playground")].map((it) => [it.state.data, it.state.layer])"""
    assert second.evaluate(chosen) == [["moons", 0], ["moons", 8]]  # the address of the page is that of the first
    second.locator("#second").get_by_label("two circles", exact=True).check()
    assert second.url.endswith("#data=circles&model=realnvp&without=nothing&layer=8&grid=data&in=second")
    assert second.evaluate(chosen) == [["moons", 0], ["circles", 8]]
    go(second, "data=curve&model=realnvp&without=nothing&layer=2&in=second")
    assert second.evaluate(chosen) == [["moons", 0], ["curve", 2]]
    go(second, "data=spiral&model=realnvp&without=nothing&layer=3")
    assert second.evaluate(chosen) == [["spiral", 3], ["curve", 2]]
    go(second, "data=moons&model=realnvp&without=nothing&layer=4&in=nowhere")
    assert second.evaluate(chosen) == [["spiral", 3], ["curve", 2]]
    # A link to the present address, after both have been changed, moves the one that it names.
    go(second, "data=moons&model=nice&without=nothing&layer=1&in=second")
    second.evaluate("for (const it of document.querySelectorAll('flow-playground')) it.state.layer = 7")
    second.locator('a[href^="#data=moons"]').first.evaluate("link => { link.hash = location.hash; link.click(); }")
    assert second.evaluate(chosen) == [["spiral", 7], ["moons", 1]]
    # A flow of the reader's own in the first one leaves the address of the second, and the other way round.
    address = second.url
    content = export.to_json(models.realnvp_points(2, couplings=4, hidden=16))
    hand_over(second, content)
    assert second.url == address
    second.evaluate(
        "content => document.getElementById('second').open(new File([JSON.stringify(content)], 'own.json'))", content
    )
    assert second.url.endswith("#")


def test_without_scripts_there_is_a_picture(book: Path, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "chapters" / "playground.html").as_uri())
    picture = page.locator("flow-playground img").first
    assert picture.is_visible()
    assert len(picture.get_attribute("alt")) > 40
    context.close()
