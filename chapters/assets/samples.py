"""Draws samples.png, the first samples of three trained flows.

Run ``python chapters/assets/samples.py``.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

from nflows_lib.data import tile
from nflows_lib.experiments.runs import load_flow

PIXELS, COLUMNS = 128, 6  # height and width of each sample, and samples per flow
TEMPERATURES = (
    ("glow-mnist", 0.7),
    ("glow-flowers5-small", 0.85),
    ("glow-cifar10-bounded", 0.85),
)

rows = []
for name, temperature in TEMPERATURES:
    flow = load_flow(name)
    torch.manual_seed(0)
    samples = flow.sample(COLUMNS, temperature)
    channels, height, width = flow.shape
    times = PIXELS // height
    margin = (PIXELS - times * height) // 2  # 28 pixels of a digit become 112
    large = samples.repeat_interleave(times, 2).repeat_interleave(times, 3)
    large = F.pad(large, (margin,) * 4)
    shape = (channels, PIXELS, PIXELS)
    sheet = tile(large, columns=COLUMNS, levels=flow.levels, shape=shape, pad=2)
    rows.append(np.broadcast_to(sheet, (*sheet.shape[:2], 3)))
plt.imsave(Path(__file__).with_suffix(".png"), np.concatenate(rows))
