"""The same models in nflows_lib, normflows and nflows.

Our model is built first. The model of another library, a *peer*, is made from ours and takes over its parameters. So
the models agree in more than a description: if a peer can hold the same function, it gives the same log-probabilities,
and :func:`check` asserts that.

Peers differ in the number of parameters, which is counted as ``extra`` and asserted:

- normflows' 1x1 convolution keeps L and U as two full matrices, and the diagonal a third time.
- nflows' 1x1 convolution adds a bias. nflows has no diagonal scaling without a bias either: its ActNorm replaces it.

Two properties of nflows cannot be changed: its Glow has the scale factor sigmoid(h + 2) + 0.001, and the permutation of
its 1x1 convolution is on the other side of L and U.
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
    """One model in one library, with the same few functions for every library.

    module: the module that holds the parameters.
    log_prob, sample: functions that call the library as its users do.
    encode, decode: functions from data to the list of the latent's pieces, and back.
    extra: the number of parameters that only this library needs.
    exact: whether the model has the parameters and the function of ours.
    order: the index by which the dimensions of our data are reordered first; None if they keep their order.
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
    """A model, the sizes that the benchmark gives it, and the functions that make it in each library.

    build: a function of the sizes that makes our model.
    parameters: a function of the sizes that gives the number of parameters that every library needs.
    couplings: a function of the sizes that gives the number of couplings.
    peers: by library, a function of our model and the sizes that makes the library's model.
    batch: the number of examples in a batch.
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
        """Our library and those of the other libraries that are installed."""
        return [OURS, *(name for name in self.peers if find_spec(name.split(",")[0]))]

    def make(self, flow: Flow, library: str, **sizes: Any) -> Built:
        """The flow in that library, with the flow's parameters; for our library a copy of the flow."""
        sizes = _plain(self.sizes | sizes)
        if library == OURS:
            return _ours(copy.deepcopy(flow))
        return self.peers[library](flow, **sizes)


def couplings(module: nn.Module) -> int:
    """The number of couplings in a model of any library."""
    names = {*(kind.__name__ for kind in COUPLINGS), "AffineCouplingTransform", "AdditiveCouplingTransform"}
    # Classes are compared by name, since a peer may not be installed. The class or one of its bases must be known.
    return sum(bool(names & {kind.__name__ for kind in type(part).__mro__}) for part in module.modules())


def networks(flow: Flow) -> list[nn.Module]:
    """The networks inside the couplings of our flow, from data to latent."""
    return [part.network for part in flow.modules() if isinstance(part, COUPLINGS)]


def check(model: Model, flow: Flow, built: Built, x: Tensor, **sizes: Any) -> None:
    """Raise an AssertionError unless this library's model is right; x is a batch for our model."""
    sizes = _plain(model.sizes | sizes)
    expected = model.parameters(**sizes) + built.extra
    assert built.parameters == expected, f"expected {expected:,} parameters, got {built.parameters:,}"
    assert couplings(built.module) == model.couplings(**sizes)
    theirs = x if built.order is None else x[:, built.order]
    with torch.no_grad():
        pieces = built.encode(theirs)
        assert sum(piece[0].numel() for piece in pieces) == x[0].numel()
        error = (built.decode(pieces) - theirs).abs().max().item()
        assert error < 1e-3, f"expected a round trip that returns x within 1e-3, got an error of {error:.1e}"
        assert built.sample(3).shape == (3, *x.shape[1:])
        log_p = built.log_prob(theirs)
        assert log_p.shape == (len(x),) and log_p.isfinite().all()
        if built.exact:
            torch.testing.assert_close(log_p, flow.log_prob(x), rtol=1e-4, atol=1e-3)


def _ours(flow: Flow) -> Built:
    return Built(flow, flow.log_prob, flow.sample, lambda x: [flow.encode(x)], lambda z: flow.decode(z[0]), extra=0)


def _plain(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that all libraries take."""
    return {name: value for name, value in sizes.items() if name != "precision"}


def _set(**values: tuple[Tensor, Tensor]) -> None:
    """Copy the second tensor of each pair into the first."""
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
    """The channels at each scale: a squeeze makes four times as many, and half of them go on."""
    return [4 * shape[0] * 2**i for i in range(scales)]


def _glow_parameters(shape: Shape, scales: int, steps: int, hidden: int) -> int:
    def step(c: int) -> int:
        network = 9 * c // 2 * hidden + hidden**2 + 9 * hidden * c + 4 * hidden + c
        return 2 * c + c**2 + network

    return steps * sum(map(step, _channels(shape, scales)))


def _scales(flow: Flow) -> list[list[Layer]]:
    """Our layers by scale, without squeezes and factor-outs."""
    layers, scales = flow.chain, []
    while True:
        last = layers[-1]
        scales.append([layer for layer in layers if not isinstance(layer, Squeeze | FactorOut)])
        if not isinstance(last, FactorOut):
            return scales
        layers = last.inner


def _normflows_glow(flow: Flow, shape: Shape, scales: int, steps: int, hidden: int, own: bool) -> Built:
    """The Glow of normflows: if ``own``, with its own networks of the same layers, else with ours."""
    import normflows as nf

    def block(norm: ActNorm, mix: Invertible1x1Conv, coupling: GlowCoupling) -> nn.Module:
        made = nf.flows.GlowBlock(norm.channels, hidden, net_actnorm=True)
        split, theirs_mix, theirs_norm = made.flows
        if own:
            _copy_network(coupling.network, split.flows[1].param_map.net)
        else:
            split.flows[1].param_map = network = copy.deepcopy(coupling.network)
            _interleave(network.layers[-1], coupling.network.layers[-1])
        # Its forward goes from latent to data; its inverse, (z - t) exp(-s), is our forward.
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
    # normflows counts scales from the latent.
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
    """Copy a last layer for normflows, which takes shift and h in alternating channels and subtracts the shift."""
    for to, of in ((target.weight, source.weight), (target.bias, source.bias)):
        h, shift = of.chunk(2)
        _set(shift=(to[0::2], -shift), h=(to[1::2], h))


def _copy_network(ours: GlowNet, theirs: nn.Sequential) -> None:
    """Copy a network to normflows, whose ActNorms follow the convolutions; ours are in them."""
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
    """The Glow of nflows, with our networks, because the library has none for it."""
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
            # 1 marks the half that changes. nflows factors out the first half, we the second: the halves change places.
            mask = [1] * (channels // 2) + [0] * (channels // 2)
            coupling = transforms.AffineCouplingTransform(mask, lambda inputs, outputs, network=network: network)
            parts += [norm, transforms.OneByOneConvolution(channels), coupling]
        multiscale.add_transform(transforms.CompositeTransform(parts), (channels, height, width))
        channels //= 2
    extra = steps * sum(_channels(shape, scales))
    return _nflows(TheirFlow(multiscale, Normal((math.prod(shape),))), extra, exact=False)


# --- on vectors -------------------------------------------------------------------------------------------------------


class Bounded(nn.Module):
    """A network that returns shift and g tanh(s) for each dimension; our AffineCoupling applies g tanh itself."""

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
    # Our network returns s, then the shift; both other libraries take the shift first.
    last = network.layers[-1]
    _set(weight=(last.weight, last.weight.roll(last.out_features // 2, 0)))
    _set(bias=(last.bias, last.bias.roll(last.out_features // 2, 0)))
    return Bounded(network, coupling.gain)


def _halved_mlp(dims: int, hidden: int, depth: int, outputs: int) -> int:
    """The parameters of an MLP from half of the dimensions to ``outputs`` for each dimension of the other half."""
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

    assert dims == 2, (
        "normflows takes shift and scale in alternating order, which is our order only for one changed dimension"
    )
    flows = []
    for layer in flow.chain:
        split = "channel" if layer.mask[0] else "channel_inv"
        # Reversed, its block multiplies and then adds from data to latent, as ours does.
        flows.append(nf.flows.Reverse(nf.flows.AffineCouplingBlock(_network_of(layer), True, "exp", split)))
    return _normflows(nf.NormalizingFlow(nf.distributions.DiagGaussian(dims, trainable=False), flows[::-1]), extra=0)


def _nflows_points(flow: Flow, dims: int, couplings: int, hidden: int, depth: int) -> Built:
    from nflows import transforms
    from nflows.distributions import StandardNormal as Normal
    from nflows.flows import Flow as TheirFlow

    class Affine(transforms.AffineCouplingTransform):
        """The affine coupling of nflows with exp instead of its fixed sigmoid as the scale factor."""

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
    # normflows halves in the middle, its fastest way; ours are even and odd dimensions, so they are sorted first.
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
    # Neither peer has a logistic prior, so all have a normal one and log-probabilities can be compared.
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
