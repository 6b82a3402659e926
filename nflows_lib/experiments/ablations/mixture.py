"""After Glow: a mixture coupling and an attention coupling compared with Glow's, at equal time and equal updates."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib import data
from nflows_lib.coupling import BoundedGlowCoupling
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.experiments.ablations.glow import grid_of_samples, replace, score_of
from nflows_lib.experiments.mixture import mixture_glow
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.networks import finished, zeroed
from nflows_lib.training import fit

SHAPE, SIZE = (3, 16, 16), {"scales": 2, "steps": 4}
OPTIONS = {"batch_size": 64, "lr": 5e-3, "clip": 100.0, "cosine": True}


class AttentionNet(nn.Module):
    """A small transformer inside a coupling, as in Jet (Kolesnikov et al. 2024): one block over the pixels.

    Every pixel of the squeezed image is a token. The block has attention and two linear layers, each after a layer norm
    and beside a skip connection. The last layer starts at zero.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        pixels: number of pixels H W, each of which gets a learned vector that tells its place.
        width: size of a token, a multiple of the number of heads.
        heads: number of attention heads.
    """

    def __init__(self, inputs: int, outputs: int, pixels: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.place = nn.Linear(inputs, width), nn.Parameter(0.02 * torch.randn(pixels, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.last = zeroed(nn.Linear(width, outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        tokens = self.first(x.flatten(2).transpose(1, 2)) + self.place  # (B, H W, width)
        parts = self.attention(self.norms[0](tokens)).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.mix(attended)
        tokens = tokens + self.mlp(self.norms[1](tokens))
        output = self.last(self.norms[2](tokens)).transpose(1, 2)
        return finished(output.unflatten(2, x.shape[2:]), x)


def attention_glow(width: int) -> Flow:
    """A bounded Glow for 16x16 patches with a small transformer inside each coupling."""
    flow = glow(SHAPE, hidden=1, bounded=True, **SIZE)

    def coupling(layer: BoundedGlowCoupling) -> BoundedGlowCoupling:
        channels = layer.channels
        network = AttentionNet(channels // 2, channels, 64 if channels == 12 else 16, width)
        return BoundedGlowCoupling(channels, network)

    replace(flow, BoundedGlowCoupling, coupling)
    return flow


# All have as many parameters as Glow with networks of 32 channels, within 5 %.
FLOWS: dict[str, Callable[[], Flow]] = {
    "Glow": lambda: glow(SHAPE, hidden=32, bounded=True, **SIZE),
    "mixture, last": lambda: mixture_glow(SHAPE, hidden=29, mixtures=1, components=4, **SIZE),
    "mixture, all": lambda: mixture_glow(SHAPE, hidden=23, mixtures=4, components=4, **SIZE),
    "attention": lambda: attention_glow(width=28),
}


def seconds_per_update(flow: Flow, train: Tensor, updates: int = 10) -> float:
    """Seconds of this process's own time for one update of a copy of the flow."""
    trained = copy.deepcopy(flow)
    fit(trained, train, 2, **OPTIONS)
    start = time.process_time()
    fit(trained, train, updates, **OPTIONS)
    return (time.process_time() - start) / updates


def after_glow(seed: int, *, kind: str, seconds: float | None = None, updates: int = 0) -> dict[str, Any]:
    """Train a flow of one kind on 16x16 colour patches.

    Args:
        seed: seed of the run.
        kind: a key of FLOWS.
        seconds: process time of the training, from which the number of updates follows.
        updates: number of updates, if no time is given.

    Returns:
        ``test``, bits/dim on the test patches; ``updates``; ``grid`` and ``broken``, the results of
        :func:`grid_of_samples`; ``sampling``, seconds of process time for 500 samples; and ``parameters``.
    """
    torch.manual_seed(70 + seed)
    train, test = (data.patches(part).images for part in ("train", "test"))
    flow = FLOWS[kind]()
    if seconds is not None:
        updates = max(1, round(seconds / seconds_per_update(flow, train)))
    torch.manual_seed(70 + seed)
    fit(flow, train, updates, warmup=min(10, updates), **OPTIONS)
    start = time.process_time()
    grid, broken = grid_of_samples(flow)
    sampling = time.process_time() - start
    return {
        "test": score_of(flow, test, draws=2),
        "updates": updates,
        "grid": grid,
        "broken": broken,
        "sampling": sampling,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }


ABLATIONS = {
    "after-glow": Ablation(
        "Does a modern coupling beat Glow's, with as many parameters, in the same time and after as many updates?",
        (0, 1, 2),
        {kind: partial(after_glow, kind=kind, seconds=20) for kind in FLOWS}
        | {f"{kind}, 400 updates": partial(after_glow, kind=kind, updates=400) for kind in FLOWS},
    ),
}
