"""The same models in nflows_lib, normflows and nflows.

Ours is built first; a peer is made *from* it and takes its parameters over. So the three agree in more than a
description: where both can hold the same function, they give the same log-probabilities (:func:`check`).

What differs in the number of parameters, and nothing else does, is counted as ``extra`` and asserted:

- normflows' 1x1 convolution keeps L and U as two full matrices, and the diagonal a third time.
- nflows' 1x1 convolution adds a bias. It has no diagonal scaling without one either: there its ActNorm takes the place.

Two things in nflows cannot be copied: its Glow has the scale sigmoid(h + 2) + 0.001, and the permutation of its 1x1
convolution stands on the other side of L and U.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from nflows_lib import models
from nflows_lib.bijection import Layer, Shape
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling, GlowCoupling
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import nice, realnvp_points
from nflows_lib.multiscale import FactorOut, Squeeze
from nflows_lib.networks import ActNormConv, GlowNet
from nflows_lib.normalization import ActNorm

OURS = "nflows_lib"
COUPLINGS = (AdditiveCoupling, AffineCoupling, GlowCoupling)


@dataclass(frozen=True)
class Built:
    """One model in one library, behind the same few functions.

    module: what has the parameters.
    log_prob, sample: as a user of the library calls them.
    encode: data to latent, as a list of the latent's pieces; decode goes back.
    extra: parameters beyond what every library has.
    exact: has the parameters and the function of ours.
    order: what our data's dimensions must be indexed by first; None: as they are.
    """

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    encode: Callable[[Tensor], list[Tensor]]
    decode: Callable[[list[Tensor]], Tensor]
    extra: int
    exact: bool = True
    order: Tensor | None = None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


@dataclass(frozen=True)
class Model:
    """A model, its sizes as the benchmark takes them, and how to make it in each library.

    build: ours, from the sizes.
    parameters: how many every library has, from the sizes.
    couplings: how many, from the sizes.
    peers: {library: made from ours and the sizes}.
    batch: examples at a time.
    """

    title: str
    sizes: dict[str, Any]
    batch: int
    build: Callable[..., Flow]
    parameters: Callable[..., int]
    couplings: Callable[..., int]
    peers: dict[str, Callable[..., Built]] = field(default_factory=dict)

    def ours(self, **sizes: Any) -> Built:
        return _ours(self.build(**self.sizes | sizes))

    def libraries(self) -> list[str]:
        """Ours and those of the others that are installed."""
        return [OURS, *(name for name in self.peers if find_spec(name.split(",")[0]))]

    def make(self, flow: Flow, library: str, **sizes: Any) -> Built:
        """The flow in that library, with the flow's parameters: a copy also for ours."""
        sizes = _plain(self.sizes | sizes)
        if library == OURS:
            return _ours(copy.deepcopy(flow))
        return self.peers[library](flow, **sizes)


def couplings(module: nn.Module) -> int:
    """How many couplings a model has, whosever they are."""
    names = {*(kind.__name__ for kind in COUPLINGS), "AffineCouplingTransform", "AdditiveCouplingTransform"}
    # By name, not by type: a peer may not be installed. The class or one of its bases must be a known one.
    return sum(bool(names & {kind.__name__ for kind in type(part).__mro__}) for part in module.modules())


def networks(flow: Flow) -> list[nn.Module]:
    """The networks inside the couplings of ours, from data to latent."""
    return [part.network for part in flow.modules() if isinstance(part, COUPLINGS)]


def check(model: Model, flow: Flow, built: Built, x: Tensor, **sizes: Any) -> None:
    """Raise an AssertionError unless this library's model is what it should be; x is a batch for ours."""
    sizes = _plain(model.sizes | sizes)
    expected = model.parameters(**sizes) + built.extra
    assert built.parameters == expected, f"expected {expected:,} parameters, got {built.parameters:,}"
    assert couplings(built.module) == model.couplings(**sizes)
    theirs = x if built.order is None else x[:, built.order]
    with torch.no_grad():
        pieces = built.encode(theirs)
        assert sum(piece[0].numel() for piece in pieces) == x[0].numel()
        error = (built.decode(pieces) - theirs).abs().max().item()
        assert error < 1e-3, f"a round trip ends {error:.1e} away"
        assert built.sample(3).shape == (3, *x.shape[1:])
        log_p = built.log_prob(theirs)
        assert log_p.shape == (len(x),) and log_p.isfinite().all()
        if built.exact:
            torch.testing.assert_close(log_p, flow.log_prob(x), rtol=1e-4, atol=1e-3)


def _ours(flow: Flow) -> Built:
    return Built(flow, flow.log_prob, flow.sample, lambda x: [flow.encode(x)], lambda z: flow.decode(z[0]), extra=0)


def _plain(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that all libraries share."""
    return {name: value for name, value in sizes.items() if name != "precision"}


def _set(**values: tuple[Tensor, Tensor]) -> None:
    """Copy the second of each pair into the first."""
    with torch.no_grad():
        for target, source in values.values():
            target.copy_(source.reshape(target.shape))


# --- Glow -------------------------------------------------------------------------------------------------------------


def glow(shape: Shape, scales: int, steps: int, hidden: int, precision: torch.dtype = torch.float32) -> Flow:
    """:func:`nflows_lib.models.glow` on real numbers, and without learned priors: what the peers have as well."""

    flow = models.glow(shape, scales=scales, steps=steps, hidden=hidden, precision=precision)
    for part in flow.modules():
        if isinstance(part, FactorOut):
            part.prior = None
    return flow[2:]  # without dequantization and its scale


def _channels(shape: Shape, scales: int) -> list[int]:
    """Channels at each scale: four times as many after a squeeze, half of them go on."""
    return [4 * shape[0] * 2**i for i in range(scales)]


def _glow_parameters(shape: Shape, scales: int, steps: int, hidden: int) -> int:
    def step(c: int) -> int:
        network = 9 * c // 2 * hidden + hidden**2 + 9 * hidden * c + 4 * hidden + c
        return 2 * c + c**2 + network

    return steps * sum(map(step, _channels(shape, scales)))


def _scales(flow: Flow) -> list[list[Layer]]:
    """Our layers scale by scale, without the squeeze and what factors out."""
    layers, scales = flow.chain, []
    while True:
        last = layers[-1]
        scales.append([layer for layer in layers if not isinstance(layer, Squeeze | FactorOut)])
        if not isinstance(last, FactorOut):
            return scales
        layers = last.inner


def _normflows_glow(flow: Flow, shape: Shape, scales: int, steps: int, hidden: int, own: bool) -> Built:
    """own: with the networks of normflows, which are the same convolutions and ActNorms; else with ours."""
    import normflows as nf

    def block(norm: ActNorm, mix: Invertible1x1Conv, coupling: GlowCoupling) -> nn.Module:
        made = nf.flows.GlowBlock(norm.channels, hidden, net_actnorm=True)
        split, theirs_mix, theirs_norm = made.flows
        if own:
            _copy_network(coupling.network, split.flows[1].param_map.net)
        else:
            split.flows[1].param_map = network = copy.deepcopy(coupling.network)
            _interleave(network.layers[-1], coupling.network.layers[-1])
        # Its direction from latent to data is the one with formulas: (z - t) exp(-s) goes the way that we call forward.
        _set(
            s=(theirs_norm.s, -norm.log_scale),
            t=(theirs_norm.t, -norm.bias * (-norm.log_scale).exp()),
            done=(theirs_norm.data_dep_init_done, torch.ones(())),
            p=(theirs_mix.P, mix.permutation),
            sign=(theirs_mix.sign_S, mix.sign),
            lower=(theirs_mix.L, mix.factors.tril(-1)),
            upper=(theirs_mix.U, mix.factors.triu(1)),
            diagonal=(theirs_mix.log_S, mix.factors.diagonal()),
        )
        return made

    blocks, bases, merges = [], [], []
    for i, layers in enumerate(_scales(flow)):
        made = [block(*layers[j : j + 3]) for j in range(0, len(layers), 3)]
        blocks.append([*made[::-1], nf.flows.Squeeze()])
        channels, size = _channels(shape, scales)[i], [n >> (i + 1) for n in shape[1:]]
        last = i == scales - 1
        bases.append(nf.distributions.DiagGaussian((channels if last else channels // 2, *size), trainable=False))
        merges += [] if last else [nf.flows.Merge()]
    # It counts scales from the latent.
    model = nf.MultiscaleFlow(bases[::-1], blocks[::-1], merges[::-1], class_cond=False)
    return Built(
        model,
        lambda x: model.log_prob(x, None),
        lambda n: model.sample(n)[0],
        lambda x: model.inverse_and_log_det(x)[0],
        lambda z: model.forward_and_log_det(z)[0],
        extra=steps * sum(c**2 + c for c in _channels(shape, scales)),
    )


def _interleave(target: nn.Conv2d, source: nn.Conv2d) -> None:
    """normflows wants shift and h by turns, and subtracts the shift."""
    for to, of in ((target.weight, source.weight), (target.bias, source.bias)):
        h, shift = of.chunk(2)
        _set(shift=(to[0::2], -shift), h=(to[1::2], h))


def _copy_network(ours: GlowNet, theirs: nn.Sequential) -> None:
    """Our ActNorms are part of the convolutions, theirs stand after them."""
    first, _, second, _, last = ours.layers
    for i, layer in ((0, first), (3, second)):
        assert isinstance(layer, ActNormConv)
        norm = theirs[i + 1].actNorm
        _set(
            weight=(theirs[i].weight, layer.weight),
            s=(norm.s, layer.log_scale),
            t=(norm.t, layer.bias),
            done=(norm.data_dep_init_done, torch.ones(())),
        )
    _interleave(theirs[6], last)


def _nflows_glow(flow: Flow, shape: Shape, scales: int, steps: int, hidden: int) -> Built:
    """With our networks: the library leaves them to its user."""
    from nflows import transforms
    from nflows.distributions import StandardNormal as Normal
    from nflows.flows import Flow as TheirFlow

    multiscale = transforms.MultiscaleCompositeTransform(scales)
    channels, height, width = shape
    for layers in _scales(flow):
        channels, height, width = 4 * channels, height // 2, width // 2
        parts = [transforms.SqueezeTransform()]
        for i in range(0, len(layers), 3):
            norm = transforms.ActNorm(channels)
            ours, network = layers[i], copy.deepcopy(layers[i + 2].network)
            _set(s=(norm.log_scale, ours.log_scale), t=(norm.shift, ours.bias), i=(norm.initialized, torch.tensor(1)))
            # 1 marks what changes. It finishes the first half, we the second: so the halves change places.
            mask = [1] * (channels // 2) + [0] * (channels // 2)
            coupling = transforms.AffineCouplingTransform(mask, lambda inputs, outputs, network=network: network)
            parts += [norm, transforms.OneByOneConvolution(channels), coupling]
        multiscale.add_transform(transforms.CompositeTransform(parts), (channels, height, width))
        channels //= 2
    extra = steps * sum(_channels(shape, scales))
    return _nflows(TheirFlow(multiscale, Normal((math.prod(shape),))), extra, exact=False)


# --- on vectors -------------------------------------------------------------------------------------------------------


class Bounded(nn.Module):
    """A network of (shift, s) for each dimension, s as g tanh(s): what our AffineCoupling does itself."""

    def __init__(self, network: nn.Module, gain: Tensor) -> None:
        super().__init__()
        self.network, self.gain = network, nn.Parameter(gain.detach().clone())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        shift, raw = self.network(x).chunk(2, dim=1)
        return torch.cat([shift, self.gain * raw.tanh()], dim=1)


def _network_of(coupling: AffineCoupling | AdditiveCoupling) -> nn.Module:
    """A copy of the network of one of our couplings on vectors, with its outputs in the peers' order."""
    network = copy.deepcopy(coupling.network)
    if isinstance(coupling, AdditiveCoupling):
        return network
    # Ours gives s, then the shift; both libraries want the shift first.
    last = network.layers[-1]
    _set(weight=(last.weight, last.weight.roll(last.out_features // 2, 0)))
    _set(bias=(last.bias, last.bias.roll(last.out_features // 2, 0)))
    return Bounded(network, coupling.gain)


def _halved_mlp(dims: int, hidden: int, depth: int, outputs: int) -> int:
    """Parameters of an MLP from half of the dimensions, to ``outputs`` for each dimension of the other half."""
    return (dims // 2 + 1) * hidden + (depth - 1) * (hidden + 1) * hidden + (hidden + 1) * outputs * (dims // 2)


def _normflows(model: nn.Module, extra: int, order: Tensor | None = None) -> Built:
    return Built(
        model,
        model.log_prob,
        lambda n: model.sample(n)[0],
        lambda x: [model.inverse(x)],
        lambda z: model(z[0]),
        extra,
        order=order,
    )


def _nflows(model: Any, extra: int, exact: bool) -> Built:
    return Built(
        model,
        model.log_prob,
        model.sample,
        lambda x: [model.transform_to_noise(x)],
        lambda z: model._transform.inverse(z[0])[0],
        extra,
        exact,
    )


def _normflows_points(flow: Flow, dims: int, couplings: int, hidden: int, depth: int) -> Built:
    import normflows as nf

    assert dims == 2, "shift and scale by turns, which normflows wants, are one after the other for one dimension alone"
    flows = []
    for layer in flow.chain:
        split = "channel" if layer.mask[0] else "channel_inv"
        # Reversed, it multiplies and then adds on the way from data to latent, as we do.
        flows.append(nf.flows.Reverse(nf.flows.AffineCouplingBlock(_network_of(layer), True, "exp", split)))
    return _normflows(nf.NormalizingFlow(nf.distributions.DiagGaussian(dims, trainable=False), flows[::-1]), extra=0)


def _nflows_points(flow: Flow, dims: int, couplings: int, hidden: int, depth: int) -> Built:
    from nflows import transforms
    from nflows.distributions import StandardNormal as Normal
    from nflows.flows import Flow as TheirFlow

    class Affine(transforms.AffineCouplingTransform):
        """Its scale is a fixed sigmoid; this is where its own AdditiveCouplingTransform replaces it, too."""

        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            shift, log_scale = transform_params.chunk(2, dim=1)
            return log_scale.exp(), shift

    parts = []
    for layer in flow.chain:
        network = _network_of(layer)
        parts.append(Affine((~layer.mask).long(), lambda inputs, outputs, network=network: network))
    return _nflows(TheirFlow(transforms.CompositeTransform(parts), Normal((dims,))), extra=0, exact=True)


def _normflows_nice(flow: Flow, dims: int, couplings: int, hidden: int, depth: int) -> Built:
    import normflows as nf

    *layers, scaling = flow.chain
    # It cuts in the middle where we take even and odd: the fastest way it has, and the same model of sorted dimensions.
    order = torch.cat([layers[0].mask.nonzero().flatten(), (~layers[0].mask).nonzero().flatten()])
    flows = []
    for layer in layers:
        split = "channel" if layer.mask[0] else "channel_inv"
        flows.append(nf.flows.Reverse(nf.flows.AffineCouplingBlock(_network_of(layer), scale=False, split_mode=split)))
    theirs = nf.flows.AffineConstFlow((dims,), shift=False)
    _set(s=(theirs.s, scaling.log_scale[order]))
    flows.append(nf.flows.Reverse(theirs))
    base = nf.distributions.DiagGaussian(dims, trainable=False)
    return _normflows(nf.NormalizingFlow(base, flows[::-1]), extra=0, order=order)


def _nflows_nice(flow: Flow, dims: int, couplings: int, hidden: int, depth: int) -> Built:
    from nflows import transforms
    from nflows.distributions import StandardNormal as Normal
    from nflows.flows import Flow as TheirFlow

    *layers, scaling = flow.chain
    parts = []
    for layer in layers:
        network, mask = _network_of(layer), (~layer.mask).long()
        parts.append(transforms.AdditiveCouplingTransform(mask, lambda inputs, outputs, network=network: network))
    norm = transforms.ActNorm(dims)
    _set(s=(norm.log_scale, scaling.log_scale), initialized=(norm.initialized, torch.tensor(1)))
    parts.append(norm)
    return _nflows(TheirFlow(transforms.CompositeTransform(parts), Normal((dims,))), extra=dims, exact=True)


# --- the table --------------------------------------------------------------------------------------------------------

MODELS: dict[str, Model] = {
    "glow": Model(
        title="Glow on 3x32x32, 2 scales of 4 steps, 64 hidden channels",
        sizes={"shape": (3, 32, 32), "scales": 2, "steps": 4, "hidden": 64},
        batch=32,
        build=glow,
        parameters=_glow_parameters,
        couplings=lambda shape, scales, steps, hidden: scales * steps,
        peers={
            "normflows": lambda flow, **sizes: _normflows_glow(flow, **sizes, own=True),
            "normflows, our networks": lambda flow, **sizes: _normflows_glow(flow, **sizes, own=False),
            "nflows": _nflows_glow,
        },
    ),
    "realnvp": Model(
        title="RealNVP on points, 6 affine couplings, MLPs of 2x64",
        sizes={"dims": 2, "couplings": 6, "hidden": 64, "depth": 2},
        batch=512,
        build=realnvp_points,
        parameters=lambda dims, couplings, hidden, depth: couplings * (_halved_mlp(dims, hidden, depth, 2) + 1),
        couplings=lambda dims, couplings, hidden, depth: couplings,
        peers={"normflows": _normflows_points, "nflows": _nflows_points},
    ),
    # Neither peer has a logistic prior: a normal one for all, so that log-probabilities can be compared.
    "nice": Model(
        title="NICE on 784 dimensions, 4 additive couplings, MLPs of 5x1000, normal prior",
        sizes={"dims": 784, "couplings": 4, "hidden": 1000, "depth": 5},
        batch=256,
        build=lambda **sizes: nice(**sizes, base=StandardNormal()),
        parameters=lambda dims, couplings, hidden, depth: couplings * _halved_mlp(dims, hidden, depth, 1) + dims,
        couplings=lambda dims, couplings, hidden, depth: couplings,
        peers={"normflows": _normflows_nice, "nflows": _nflows_nice},
    ),
}
