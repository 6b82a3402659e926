"""Training in less memory: a flow is invertible, so its layers' inputs need not be stored.

For the backward pass, autograd stores the inputs of every operation of the forward pass. :func:`reversible` and
:func:`checkpointed` return a flow with the same layers and parameters that stores less and recomputes the rest when it
is needed. Write checkpoints from the original flow, not from the flow that these functions return.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from nflows_lib.bijection import Bijection, Chain, Layer
from nflows_lib.flow import Flow
from nflows_lib.multiscale import FactorOut
from nflows_lib.normalization import FlowBatchNorm


def peak_memory(task: Callable[[], object], device: str = "cpu") -> int:
    """The largest number of bytes that a task holds at one time, not counting what was allocated before it began.

    On a CPU the number is the sum of what PyTorch's allocator reports to the profiler. It is exact and the same in
    every run, and does not include memory that oneDNN and MKL allocate for themselves.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without this the profiler complains of a missing GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def reversible(flow: Flow) -> Flow:
    """The flow with a backward pass that goes through the layers' inverses, so that memory does not grow with depth.

    Only the chain's output is stored. The backward pass recomputes each layer's input from its output by the layer's
    inverse, runs the layer once more, and differentiates this layer alone. A training step costs about one forward and
    one inverse pass more. The layers before a :class:`FactorOut` are run again once, the layers inside it twice, and so
    on. A noise layer at the first position runs as usual. The idea is that of Gomez et al. 2017 for networks.

    The recomputed inputs are as exact as the round trip. If the scales are so extreme that the round trip does not
    return the input in float32, then the gradients are wrong; :func:`checkpointed` has no such limit. Networks must be
    deterministic: dropout, for example, would make the second run differ from the first.

    Raises:
        ValueError: if flow is no Flow, or if a layer is not an exact bijection of each example, so that its inverse
            cannot return its input.
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow: expected a Flow, got {type(flow).__name__}")
    layers = [*flow.chain]
    noise = [layer for layer in layers[:1] if not isinstance(layer, Bijection)]
    for name, layer in flow.chain.layers.named_modules():
        exact = isinstance(layer, Bijection | Chain) and not isinstance(layer, FlowBatchNorm)
        of_noise = bool(noise) and name.partition(".")[0] == "0"
        if isinstance(layer, Layer) and not exact and not of_noise:
            raise ValueError(f"flow: expected exact bijections, got {type(layer).__name__} at position {name}")

    def rebuilt(layers: list[Layer]) -> list[Layer]:
        return [_Reversible(_with_inner(layers, rebuilt))]

    return Flow([*noise, *rebuilt(layers[len(noise) :])], flow.base, flow.shape).train(flow.training)


def checkpointed(flow: Flow) -> Flow:
    """The flow with layers that, if they have a network, store only their input and run again in the backward pass.

    This is ``torch.utils.checkpoint`` around each coupling. The gradients are those of the original flow, however
    extreme its scales are. Memory still grows with depth, but by the layers' inputs instead of all that their networks
    compute.
    """

    def rebuilt(layers: list[Layer]) -> list[Layer]:
        wrapped = [_Checkpointed([layer]) if hasattr(layer, "network") else layer for layer in layers]
        return _with_inner(wrapped, rebuilt)

    return Flow(rebuilt([*flow.chain]), flow.base, flow.shape).train(flow.training)


def _with_inner(layers: list[Layer], rebuilt: Callable[[list[Layer]], list[Layer]]) -> list[Layer]:
    """The layers, in which a FactorOut at the end has its inner layers rebuilt as well."""
    if not layers or not isinstance(layers[-1], FactorOut):
        return layers
    *others, last = layers
    return [*others, FactorOut(last.shape, rebuilt([*last.inner]), last.prior)]


class _Checkpointed(Chain):
    """A chain of which autograd stores only the input."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return checkpoint(super().forward, x, context, use_reentrant=False)


class _Reversible(Chain):
    """A chain of exact bijections of which autograd stores only the output."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return super().forward(x, context)
        return _BackThroughInverses.apply(self, x, context, *self.parameters())


class _BackThroughInverses(torch.autograd.Function):
    """A chain's forward pass, with a backward pass that recomputes the layers' inputs by their inverses."""

    @staticmethod
    def forward(
        ctx: Any, chain: _Reversible, x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, log_det = chain(x, context)  # autograd is off here, so nothing is stored
        ctx.chain = chain
        ctx.save_for_backward(z, context)
        return z, log_det

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, gradient_of_log_det: Tensor) -> tuple[Tensor | None, ...]:
        z, context = ctx.saved_tensors
        contexts = [context] if ctx.needs_input_grad[2] else []
        found: dict[Tensor, Tensor] = {}
        for layer in reversed(ctx.chain.layers):
            x = layer.inverse(z, context).requires_grad_()
            with torch.enable_grad():
                out, log_det = layer(x, context)
                total = (out * gradient).sum() + (log_det * gradient_of_log_det).sum()
            own = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            gradient, *others = torch.autograd.grad(total, [x, *own, *contexts], allow_unused=True)
            for tensor, part in zip([*own, *contexts], others, strict=True):
                if part is not None:  # layers may share a parameter, and share the context
                    found[tensor] = part if tensor not in found else found[tensor] + part
            z = x.detach()
        of_parameters = [found.get(parameter) for parameter in ctx.chain.parameters()]
        return None, gradient, found.get(context) if contexts else None, *of_parameters
