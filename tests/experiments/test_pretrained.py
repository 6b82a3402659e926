"""Tests of the shipped files: models load and sample on the CPU, and the queue agrees with the records."""

from __future__ import annotations

import pytest
import torch
from bijections import Masked
from torch import nn

from nflows_lib.coupling import AdditiveCoupling
from nflows_lib.experiments import archive, checkpoint, runs, table
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP

PRETRAINED = archive.ROOT / "data" / "pretrained"
SHIPPED = sorted(path.parent.name for path in PRETRAINED.glob("*/model.safetensors"))
QUEUE = (PRETRAINED / "README.md").read_text(encoding="utf-8")


def test_something_is_shipped_and_small():
    assert "nice-mnist-small" in SHIPPED
    sizes = [(archive.folder(name) / archive.MODEL).stat().st_size for name in SHIPPED]
    assert max(sizes) <= 4 * 2**20
    assert sum(sizes) <= 16 * 2**20


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_loads_and_samples(name):
    flow = runs.load_flow(name)
    torch.manual_seed(0)
    context_shape = table.find(name).context_shape
    context = None if context_shape is None else torch.rand(16, *context_shape)
    drawn = flow.sample(16, context=context)
    assert drawn.shape == (16, *flow.shape)
    assert drawn.min() >= 0
    assert drawn.max() < flow.levels
    # The model is trained: an untrained one gives the same grey noise everywhere, or as many ones as zeros.
    assert drawn.float().std() > 1 or drawn.float().mean() < 0.4
    log_p = flow.log_prob(drawn, context)
    assert log_p.isfinite().all()
    record = archive.load(name)
    assert sum(parameter.numel() for parameter in flow.parameters()) == record["parameters"]
    tensors, _ = checkpoint.load(archive.folder(name) / archive.MODEL)
    stored = sum(tensors[key].numel() for key, _ in flow.named_parameters())
    assert stored == record.get("parameters_with_masked_ones", record["parameters"])


@torch.no_grad()
def test_a_shipped_nice_of_masked_couplings_is_the_same_function_in_halves():
    """Its networks took whole vectors with zeros in them when it was trained, and its file holds those weights."""
    tensors, _ = checkpoint.load(archive.folder("nice-mnist-small") / archive.MODEL)
    flow = runs.load_flow("nice-mnist-small")
    layers = list(flow.chain)
    for i, layer in enumerate(layers):
        if isinstance(layer, AdditiveCoupling):
            linear = [part for part in layer.network.layers if isinstance(part, nn.Linear)]
            network = MLP(784, 784, linear[0].out_features, len(linear) - 1)
            layers[i] = Masked(layer.mask, network, affine=False)
    masked = Flow(layers, flow.base, flow.shape)
    masked.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    x, halves, whole = 256 * torch.rand(64, 784), flow[1:].double(), masked[1:].double()
    torch.testing.assert_close(halves.log_prob(x.double()), whole.log_prob(x.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(halves.encode(x.double()), whole.encode(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SHIPPED)
def test_half_precision_costs_less_than_a_hundredth_of_a_bit(name):
    """Records from before runs measured this difference hold the stored model's result instead."""
    record = archive.load(name)
    if "half_precision_adds" in record:
        added = record["half_precision_adds"]["bits_per_dim"]
    else:
        added = record["figure_in_half_precision"]["bits_per_dim"] - record["figure"]["bits_per_dim"]
    assert abs(added) < 0.01


@pytest.mark.parametrize("name", sorted(path.parent.name for path in PRETRAINED.glob("*/run.json")))
def test_the_queue_says_what_the_record_says(name):
    record = archive.load(name)
    figure = record["figure"]
    (line,) = [line for line in QUEUE.splitlines() if f"| `{name}` |" in line]
    assert f"| {figure['bits_per_dim']:.3f} ± {figure['error']:.3f} | {record['minutes']:.0f} minutes on " in line
    assert ("record and model" in line) == (name in SHIPPED)


@pytest.mark.parametrize("name", [name for name in table.RUNS if table.RUNS[name].paper])
def test_every_run_with_a_figure_to_beat_is_in_the_queue(name):
    (line,) = [line for line in QUEUE.splitlines() if f"| `{name}` |" in line]
    assert f"{table.RUNS[name].paper[0]}" in line
