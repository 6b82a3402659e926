"""Train the playground's flows and write them for the page: ``python tools/playground.py``, 15 minutes on one core.

``python tools/playground.py pictures`` only draws the two pictures for readers without scripts and that of the cover. All
but the first show the page's own elements in Chromium.

The flows are small and smooth, so that a reader can follow them: 8 couplings with one hidden layer of 20 units.
`_extra/playground/flows.js` holds all flows, rounded by `nflows_lib.experiments.export`, and the points of each set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor, nn

import chromium
from nflows_lib import data, plotting
from nflows_lib.bijection import Chain
from nflows_lib.coupling import AffineCoupling, alternating_mask
from nflows_lib.distributions import StandardNormal
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments import export
from nflows_lib.flow import Flow
from nflows_lib.models import nice, realnvp_points
from nflows_lib.training import NonFiniteLoss, fit

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
FILE = ROOT / "_extra" / "playground" / "flows.js"
STILL = ROOT / "chapters" / "assets" / "playground" / "still.png"
PREFIX = "globalThis.playgroundSets = "
TRAINER = ("page.js", "train.js", "flow.js", "trainer.js")  # the scripts of <flow-trainer>, in this order
PLAYGROUND = ("page.js", "train.js", "flow.js", "flows.js", "playground.js")  # those of <flow-playground>
SHOWN = 184  # points of a set in the page
SIZES = {"couplings": 8, "hidden": 20, "depth": 1, "activation": nn.SiLU}


class Untamed(AffineCoupling):
    """An affine coupling whose log-scale is unbounded, since it lacks the g tanh(.) (chapter 3, F12)."""

    def _log_scale_and_shift(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._network_output(x1, context, outputs=2)
        return log_scale, shift


def sine(n: int) -> Tensor:
    """n points near the sine curve, (n, 2), on which chapter 3 shows F12."""
    x = torch.randn(n, 1)
    return torch.cat([x, x.sin() + 0.01 * torch.randn(n, 1)], dim=1)


SETS: dict[str, tuple[str, Callable[[int], Tensor]]] = {
    "moons": ("two moons", lambda n: data.toy("moons", n)),
    "circles": ("two circles", lambda n: data.toy("circles", n)),
    "spiral": ("a spiral", lambda n: data.toy("swiss_roll", n)),
    "curve": ("a thin curve", sine),
}
MODELS: dict[str, Callable[[], Flow]] = {
    "nice": lambda: nice(2, base=StandardNormal(), **SIZES),
    "realnvp": lambda: realnvp_points(2, **SIZES),
}
LEFT_OUT = {"nice": ("nothing", "scaling", "alternation"), "realnvp": ("nothing", "alternation", "tanh")}


def build(model: str, without: str) -> Flow:
    """A new flow without one of its parts; ``without`` names the part, or is "nothing"."""
    flow = MODELS[model]()
    for layer in flow.chain:
        if hasattr(layer, "network"):  # spread the bends of the few units over the data, not only around 0
            for parameter in layer.network.layers[0].parameters():
                parameter.data *= 3
    if without == "scaling":
        return flow[:-1]
    if without == "tanh":
        return untamed(flow)
    if without == "alternation":
        for layer in flow.chain:
            if hasattr(layer, "mask"):
                layer.load_state_dict({**layer.state_dict(), "mask": alternating_mask(2, 0)})
    return flow


def untamed(flow: Flow) -> Flow:
    """The flow with couplings that use their networks' log-scales without a bound."""
    return Flow([Untamed(layer.mask, layer.network) for layer in flow.chain], flow.base, flow.shape).eval()


def to_json(flow: Flow) -> dict[str, Any]:
    """The flow as JSON, as the library's ``export.to_json`` writes it, except that an untamed coupling has no gain."""
    if not any(isinstance(layer, Untamed) for layer in flow.chain):
        return export.to_json(flow)
    content = export.to_json(
        Flow([AffineCoupling(layer.mask, layer.network) for layer in flow.chain], flow.base, flow.shape)
    )
    for layer in content["layers"]:
        del layer["gain"]
    return content


def from_json(content: dict[str, Any]) -> Flow:
    """The flow that :func:`to_json` described."""
    if all("gain" in layer for layer in content["layers"] if layer["kind"] == "affine"):
        return export.from_json(content)
    return untamed(export.from_json({**content, "layers": [{"gain": 1.0, **layer} for layer in content["layers"]]}))


def trained(name: str, model: str, without: str, lr: float = 1e-2) -> tuple[Flow, float]:
    """A flow trained on one of the sets, and its learning rate, which is halved until the loss stays finite."""
    torch.manual_seed(1)
    flow, points = build(model, without), SETS[name][1](20_000)
    try:
        fit(flow, points, 3000, batch_size=512, lr=lr, clip=1.0, warmup=100, cosine=True, ema=0.99)
    except NonFiniteLoss as error:
        print(f"{name}, {model} without {without}, learning rate {lr}: {error}")
        return trained(name, model, without, lr / 2)
    return flow, lr


def described(name: str, flow: Flow, lr: float) -> dict[str, Any]:
    """The page's entry for a flow: the rounded flow, its mean log p over 20,000 new points in nats, and its rate."""
    content = to_json(flow)
    torch.manual_seed(2)
    log_p = log_likelihoods(from_json(content), SETS[name][1](20_000)).mean().item()
    return {**content, "log_prob": round(log_p, 2), "lr": lr}


def read() -> dict[str, Any]:
    """The file's content."""
    return json.loads(FILE.read_text(encoding="utf-8").removeprefix(PREFIX).rstrip(";\n"))


def draw_still() -> None:
    """Draw the picture for readers without scripts: RealNVP on the moons after 0, 3, 6 and all layers."""
    flow = from_json(read()["moons"]["flows"]["realnvp"]["nothing"])
    layers = list(flow.chain)
    stages = Flow([Chain(layers[:3]), Chain(layers[3:6]), Chain(layers[6:])], flow.base, flow.shape)
    torch.manual_seed(5)
    plotting.style()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9))
    plotting.warp(axes, stages, data.toy("moons", 400), extent=3.0, lines=13)
    for ax, title in zip(axes, ["data", "after 3 layers", "after 6 layers", "latent"], strict=True):
        ax.set_title(title)
    STILL.parent.mkdir(exist_ok=True)
    figure.savefig(STILL, dpi=75)


@contextmanager
def in_browser(element: str, scripts: tuple[str, ...], address: str = "") -> Iterator[Page]:
    """A page that holds nothing but one of the playground's elements, at an address that ends as given."""
    from playwright.sync_api import sync_playwright

    tags = "".join(f'<script src="{(FILE.parent / name).as_uri()}"></script>' for name in scripts)
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        body = f'<body style="font-family: sans-serif">{element}{tags}</body>'
        file.write_text(f'<!doctype html><meta charset="utf-8">{body}', encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium.require(), args=chromium.ARGUMENTS)
        page = browser.new_page(viewport={"width": 820, "height": 1000})
        page.goto(file.as_uri() + address)
        yield page
        browser.close()


def draw_training() -> None:
    """Draw the picture of the element that trains: two flows, one without its scaling layer, after 1,500 steps."""
    with in_browser('<flow-trainer at="train=moons&amp;broken=scaling"></flow-trainer>', TRAINER) as page:
        page.wait_for_function("document.querySelector('flow-trainer').worker")
        page.evaluate("document.querySelector('flow-trainer').worker.postMessage({ steps: 1500 })")
        page.wait_for_function("document.querySelector('flow-trainer').steps === 1500")
        picture = page.locator("flow-trainer .view").screenshot()
    Image.open(BytesIO(picture)).save(STILL.with_name("training.webp"), quality=75, method=6)


def draw_screenshot() -> None:
    """Draw the cover's picture of the playground: RealNVP on the moons after five layers, without its choices."""
    state = "#data=moons&model=realnvp&without=nothing&layer=5"
    with in_browser("<flow-playground></flow-playground>", PLAYGROUND, state) as page:
        page.wait_for_function("document.querySelector('flow-playground').heats?.[5]")
        between = page.evaluate("""() => {
          const { slider, now } = document.querySelector("flow-playground");
          const [from, to] = [slider.parentElement, now].map((part) => part.getBoundingClientRect());
          return { x: from.x - 4, y: from.y - 4, width: from.width + 8, height: to.bottom - from.y + 8 };
        }""")
        picture = page.screenshot(clip=between, full_page=True)
    few_colours = Image.open(BytesIO(picture)).convert("RGB").quantize(160, dither=Image.Dither.NONE)
    few_colours.save(STILL.with_name("screenshot.png"), optimize=True)


def main() -> None:
    """Train all flows, write the file and draw the pictures."""
    sets: dict[str, Any] = {}
    for name, (title, draw) in SETS.items():
        torch.manual_seed(3)
        sets[name] = {"title": title, "points": export.encode(draw(SHOWN)), "flows": {}}
        for model, lines in LEFT_OUT.items():
            flows = {without: described(name, *trained(name, model, without)) for without in lines}
            sets[name]["flows"][model] = flows
            print(name, model, {without: flow["log_prob"] for without, flow in flows.items()}, flush=True)
    FILE.write_text(f"{PREFIX}{json.dumps(sets, separators=(',', ':'))};\n", encoding="utf-8")
    draw_pictures()


def draw_pictures() -> None:
    """Draw the pictures for readers without scripts, and that of the cover."""
    draw_still()
    draw_training()
    draw_screenshot()


if __name__ == "__main__":
    draw_pictures() if sys.argv[1:] == ["pictures"] else main()
