"""Draws cover.png, a NICE from data to latent: ``python chapters/assets/cover.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from nflows_lib import data, plotting
from nflows_lib.models import nice
from nflows_lib.training import fit

plotting.style()
torch.manual_seed(1)
flow = nice(2, couplings=4, hidden=64, depth=2)
points = data.toy("two_gaussians", 4000)
fit(flow, points, steps=1000, lr=5e-3, warmup=100, cosine=True)

_, axes = plt.subplots(1, 6, figsize=(12, 2.3))
plotting.warp(axes, flow, points[:1000], lines=19)
for ax, title in zip(
    axes,
    ["data", "coupling 1", "coupling 2", "coupling 3", "coupling 4", "latent"],
    strict=True,
):
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
plt.savefig(Path(__file__).with_suffix(".png"), dpi=110)
