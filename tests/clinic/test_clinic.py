"""The doctor names the cause of every broken variant of the course, and finds nothing wrong with the fixed ones.

The broken layers are those of the chapters, taken out of the notebooks.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib
import json
import math
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bijections import Masked
from torch import Tensor, nn

import nflows_lib
from nflows_lib import clinic, data, doctor
from nflows_lib.bijection import Chain
from nflows_lib.clinic import Finding, learning, report
from nflows_lib.clinic.control import default_dtype
from nflows_lib.clinic.examination import Case
from nflows_lib.clinic.registry import TESTS
from nflows_lib.convolution import ChannelPermutation, Invertible1x1Conv
from nflows_lib.coupling import AffineCoupling, GlowCoupling, alternating_mask, channel_mask, checkerboard_mask
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize
from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.experiments import ablations, checkpoint
from nflows_lib.flow import Flow
from nflows_lib.models import cglow, glow, nice, realnvp, realnvp_points
from nflows_lib.multiscale import Squeeze
from nflows_lib.networks import MLP, GlowNet, ResNet
from nflows_lib.normalization import ActNorm, DiagonalScaling, FlowBatchNorm
from nflows_lib.training import fit

ROOT = Path(__file__).parents[2]
ROWS = 32  # examples of a patient's batch: enough for the doctor's statistics, and half as many as it takes


@functools.cache
def chapter(name: str) -> SimpleNamespace:
    """The imports, classes and functions of a chapter, without running the rest of it."""
    cells = json.loads((ROOT / "chapters" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    namespace: dict = {}
    for node in ast.parse(source).body:
        if isinstance(node, kinds):
            with contextlib.suppress(NameError):  # a function whose defaults another cell computes
                exec(compile(ast.Module([node], type_ignores=[]), name, "exec"), namespace)
    return SimpleNamespace(**namespace)


@functools.cache
def digits() -> Tensor:
    return data.digits("train").images  # (1498, 1, 8, 8)


@functools.cache
def patches() -> Tensor:
    images = data.patches("train", size=8).images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:512]]


def examined(flow: nn.Module, batch: Tensor, context: Tensor | None = None, **options: object) -> list[Finding]:
    """The doctor's findings; each names only entries that its test declares."""
    findings = doctor(flow, batch, context, **options)
    declared = {test.name: {"", *test.finds} for test in TESTS}
    assert all(finding.entry in declared[finding.test] for finding in findings), findings
    return findings


@dataclass
class Patient:
    flow: nn.Module
    batch: Tensor
    context: Tensor | None = None
    options: dict = field(default_factory=dict)

    def examined(self) -> list[Finding]:
        return examined(self.flow, self.batch, self.context, **self.options)


def vectors(n: int = ROWS) -> Tensor:
    return digits()[:n].flatten(1)


def small_nice(**options: object) -> Flow:
    return nice(64, levels=17, couplings=4, hidden=32, depth=2, **options)


def with_layers(flow: Flow, layers: list) -> Flow:
    return Flow(layers, flow.base, flow.shape)


def first(layer: nn.Module, *rest: nn.Module) -> Flow:
    """A small NICE with these layers instead of its noise and its rescaling."""
    whole = small_nice()
    return with_layers(whole, [layer, *rest, *whole.chain[1 + len(rest) :]])


def toy(layers: list, base: object = None) -> Patient:
    return Patient(Flow(layers, base or StandardNormal(), (2,)).eval(), data.toy("moons", ROWS))


# --- the failures of the course: each function makes a broken patient, or the same patient fixed ----------------------


def f1(fixed: bool) -> Patient:
    whole = small_nice()
    return Patient(whole if fixed else whole[:-1], vectors())


def f2(fixed: bool) -> Patient:
    layers = chapter("01_nice").AdditiveCoupling
    couplings = [layers(alternating_mask(2, i % 2 if fixed else 0), MLP(1, 1, hidden=64, depth=2)) for i in range(4)]
    return toy([*couplings, DiagonalScaling(2)], StandardLogistic())


def f3(fixed: bool) -> Patient:
    lesson = chapter("01_nice")
    kind = lesson.Masked if fixed else lesson.Unmasked
    layers = [kind(alternating_mask(8, i), lesson.random_mlp(8)) for i in (0, 1)]
    flow = Flow([*layers, DiagonalScaling(8)], StandardLogistic(), (8,))
    fit(flow, torch.randn(256, 8), steps=60, lr=5e-3)
    return Patient(flow, torch.randn(ROWS, 8))


def f4(fixed: bool) -> Patient:
    return Patient(small_nice(base=None if fixed else chapter("01_nice").LearnedLogistic(64)), vectors())


def f4_graph(fixed: bool) -> Patient:
    """A flow with a scale of the prior that is computed once, outside of the loop."""

    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(64))
            self.scale = None if fixed else self.log_scale.exp()

        def log_prob(self, z: Tensor) -> Tensor:
            scale = self.log_scale.exp() if self.scale is None else self.scale
            return StandardLogistic().log_prob(z / scale) - scale.log().sum()

    flow = small_nice(base=Prior())
    return Patient(flow[:-1], vectors())  # without the scaling layer that it would mirror


def f5(fixed: bool) -> Patient:
    flow = small_nice()
    if not fixed:
        nn.init.normal_(flow.chain[-1].log_scale)
    return Patient(flow, vectors())


def f6(fixed: bool) -> Patient:
    whole = nice(64, levels=2, couplings=2, hidden=64, depth=2)
    binary = (digits().flatten(1) > 7).to(torch.uint8)
    flow, values = (whole, binary) if fixed else (whole[1:], binary.float())
    fit(flow, values, 20 if fixed else 600, batch_size=128, lr=1e-2)  # the fixed flow is hardly trained: see F14
    return Patient(flow, values[:ROWS])


def f7(fixed: bool) -> Patient:
    k = torch.randint(4, (256, 2))
    whole = nice(2, levels=4, couplings=2, hidden=16, depth=1)
    noise = UniformDequantize(4) if fixed else chapter("02_dequantization").Clamped(4)
    return Patient(with_layers(whole, [noise, *whole.chain[1:]]), k)


def f8_batch(fixed: bool) -> Patient:
    return Patient(first(UniformDequantize(17) if fixed else chapter("02_dequantization").PerBatch(17)), vectors())


def f8_run(fixed: bool) -> Patient:
    return Patient(first(UniformDequantize(17) if fixed else chapter("02_dequantization").PerRun(17)), vectors())


def f9(fixed: bool) -> Patient:
    class Wide(Rescale):  # (k + eps) / (n - 1), scored with D log n
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x / 16, super().forward(x)[1]

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return 16 * z

    return Patient(first(UniformDequantize(17), (Rescale if fixed else Wide)(1 / 17)), vectors())


def f10(fixed: bool) -> Patient:
    scale = Rescale if fixed else chapter("02_dequantization").Scale
    return Patient(first(UniformDequantize(17), scale(1 / 17)), vectors())


def f11(fixed: bool) -> Patient:
    """The gradients of the recorded runs, each the longest of ten steps, as the optimizer took them."""
    arm = "no batch norm, clipped at 1" if fixed else "no batch norm, not clipped"
    norms = ablations.load("realnvp-clipping")["results"][arm][0]["gradient"]
    flow = realnvp_points(2)
    return Patient(
        flow, data.toy("moons", ROWS), options={"grad_norms": [min(g, 1.0) for g in norms] if fixed else norms}
    )


def on_sine(kind: str, couplings: int, steps: int) -> Patient:
    lesson = chapter("03_realnvp")
    masks = [alternating_mask(2, i % 2) for i in range(couplings)]
    flow = Flow([getattr(lesson, kind)(mask, lesson.mlp()) for mask in masks], StandardNormal(), (2,))
    fit(flow, lesson.sine(5000), steps, lr=5e-3, clip=1.0)
    return Patient(flow, lesson.sine(ROWS))


def f12(fixed: bool) -> Patient:
    return on_sine("WithGain" if fixed else "Affine", couplings=4, steps=200)


def f13(fixed: bool) -> Patient:
    return on_sine("WithGain" if fixed else "TanhAlone", couplings=2, steps=400)


def small_realnvp() -> Flow:
    return realnvp((1, 8, 8), levels=17, couplings=2, hidden=16, blocks=1)


def trained(flow: Flow) -> Flow:
    fit(flow, digits(), steps=60, batch_size=64, lr=3e-3, clip=100.0)
    return flow


@functools.cache
def trained_once() -> Flow:
    return trained(small_realnvp())


def trained_realnvp() -> Flow:
    return copy.deepcopy(trained_once())


def f14(fixed: bool) -> Patient:
    whole = small_realnvp()
    bare = with_layers(whole, [layer for layer in whole.chain if not isinstance(layer, Logit)])
    return Patient(trained_realnvp() if fixed else trained(bare), digits()[:ROWS])


def f14_margin(fixed: bool) -> Patient:
    flow = nice(64, levels=17, couplings=2, hidden=16, depth=1)
    logit = Logit(0.05)
    logit.alpha = 0.05 if fixed else 0.0
    return Patient(with_layers(flow, [*flow.chain[:2], logit, *flow.chain[2:]]), vectors())


def f15(fixed: bool) -> Patient:
    return Patient(trained_realnvp().train(not fixed), digits()[:ROWS])


def f15_stale(fixed: bool) -> Patient:
    flow = trained_realnvp()
    for layer in flow.chain:
        if isinstance(layer, FlowBatchNorm) and not fixed:
            layer.running_mean.zero_()
            layer.running_variance.zero_()
    return Patient(flow, digits()[:ROWS])


def f17(fixed: bool) -> Patient:
    squeeze = Squeeze() if fixed else chapter("04_multiscale").BareReshape()
    layers = [UniformDequantize(256), Rescale(1 / 256), Logit(0.05), squeeze]
    for i in range(2):
        network = ResNet(12, 24, hidden=8, blocks=1)
        layers += [AffineCoupling(channel_mask((12, 4, 4), i % 2), network), FlowBatchNorm(12)]
    flow = Flow(layers, StandardNormal(), (3, 8, 8))
    fit(flow, patches(), steps=30, batch_size=64, lr=3e-3, clip=100.0)
    return Patient(flow, patches()[:ROWS])


@functools.cache
def trained_nested() -> tuple[Flow, Tensor]:
    """A flow with a split, and the batch that it was trained on until its networks had left their random start."""
    couplings = [AffineCoupling(channel_mask((4, 4, 4), i), ResNet(4, 8, 8, 1)) for i in (0, 1)]
    inner = [AffineCoupling(channel_mask((2, 4, 4), i), ResNet(2, 4, 8, 1)) for i in (0, 1)]
    split = chapter("04_multiscale").Nested(inner, (2, 4, 4))
    flow = Flow([Squeeze(), *couplings, split], StandardNormal(), (1, 8, 8))
    batch = torch.randn(256, 1, 8, 8)
    fit(flow, batch, steps=50, lr=3e-3)
    return flow, batch


def f18(fixed: bool) -> Patient:
    Nested = chapter("04_multiscale").Nested

    class Redrawn(Nested):  # the inverse redraws the factored-out half instead of taking it from z
        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            done, inside = z.chunk(2, dim=1)
            return super().inverse(torch.cat([torch.randn_like(done), inside], dim=1))

    flow, batch = copy.deepcopy(trained_nested())
    if not fixed:
        flow.chain[
            -1
        ].__class__ = Redrawn  # training calls no inverse, so the broken flow would be trained in the same way
    return Patient(flow, batch[:ROWS])


def f18_coarse(fixed: bool) -> Patient:
    """A split whose forward returns only the coarse half, and whose inverse draws the other half."""

    class Split(Squeeze):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            self.done = z[:, 2:]
            return z[:, :2], log_det + StandardNormal().log_prob(self.done)

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return super().inverse(torch.cat([z, torch.randn_like(z)], dim=1))

    flow = Flow([Squeeze()], StandardNormal(), (1, 4, 4))
    if not fixed:
        flow.chain.layers[0] = Split()
    return Patient(flow, torch.randn(ROWS, 1, 4, 4))


class Scored(Flow):
    """A flow whose bits_per_dim is that of -log p(u) plus a correction."""

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, draws: int = 1) -> Tensor:
        nats = -(self(x, context) + self.dims * math.log(self.levels))
        return (nats + self.counted * math.log(self.levels)) / (self.dims * math.log(2))


@functools.cache
def trained_scales() -> Flow:
    whole = realnvp((1, 8, 8), levels=17, scales=2, couplings=2, hidden=4, blocks=0)
    fit(whole, digits(), steps=30, batch_size=64, lr=3e-3, clip=100.0)
    return whole


def f19(fixed: bool) -> Patient:
    whole = copy.deepcopy(trained_scales())
    flow = Scored([*whole.chain], whole.base, whole.shape).eval()
    flow.counted = 64 if fixed else 32
    return Patient(flow, digits()[:ROWS])


def small_glow(images: Tensor | None = None) -> Flow:
    flow = glow((3, 8, 8), scales=1, steps=4, hidden=8)
    flow.initialize(patches()[64:128] if images is None else images)
    return flow


def f20(fixed: bool) -> Patient:
    noise = torch.randint(256, (64, 3, 8, 8))
    return Patient(small_glow(None if fixed else noise), patches()[:ROWS])


def f20_constant(fixed: bool) -> Patient:
    """A batch with a fourth channel that is always 1; the fixed flow has no such channel."""
    x = (
        torch.randn(ROWS, 3, 4, 4)
        if fixed
        else torch.cat([torch.randn(ROWS, 3, 4, 4), torch.ones(ROWS, 1, 4, 4)], dim=1)
    )
    norm = chapter("05_glow").ActNormByHand(x.shape[1])
    norm.initialize(x)
    flow = Flow([norm, Invertible1x1Conv(x.shape[1])], StandardNormal(), x.shape[1:])
    return Patient(flow, x)


def f20_flag(fixed: bool) -> Patient:
    class Forgetful(chapter("05_glow").ActNormByHand):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            if not fixed:
                del self.initialized
                self.initialized = False

        def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
            if not self.initialized:
                std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
                self.log_scale.data = -std.log()[:, None, None]
                self.bias.data = -(mean / std)[:, None, None]
                self.initialized = torch.tensor(True) if fixed else True

    x = torch.randn(ROWS, 4, 4, 4)
    flow = Flow([Forgetful(4), Invertible1x1Conv(4)], StandardNormal(), (4, 4, 4))
    flow.initialize(x)
    return Patient(flow, x)


def f20_no_batch(fixed: bool) -> Patient:
    flow = glow((1, 8, 8), levels=17, scales=1, steps=2, hidden=8)
    if fixed:
        flow.initialize(digits()[64:128])
    return Patient(flow, digits()[:ROWS])


def f21(fixed: bool, exponential: bool = False) -> Patient:
    flow = glow((3, 8, 8), scales=1, steps=4, hidden=32)
    for module in flow.modules():
        if isinstance(module, GlowNet) and not fixed:
            nn.init.normal_(module.layers[-1].weight, std=0.05)
        if isinstance(module, GlowCoupling) and exponential:
            module.scale = torch.exp
    flow.initialize(patches()[64:128])
    return Patient(flow, patches()[:ROWS])


def f21_exponential(fixed: bool) -> Patient:
    return f21(fixed, exponential=not fixed)


def f22(fixed: bool, order: str = "shuffle") -> Patient:
    flow = glow((3, 8, 8), scales=1, steps=2, hidden=16)
    orders = {"shuffle": torch.randperm, "reversal": lambda n: torch.arange(n).flip(0)}

    def mixer(layer: Invertible1x1Conv) -> nn.Module:
        return ChannelPermutation(orders.get(order, torch.arange)(layer.channels))

    if not fixed:
        ablations.glow.replace(flow, Invertible1x1Conv, mixer)
    flow.initialize(patches()[64:128])
    return Patient(flow, patches()[:ROWS])


def f22_reversal(fixed: bool) -> Patient:
    return f22(fixed, "reversal")


def f22_nothing(fixed: bool) -> Patient:
    return f22(fixed, "nothing")


def f23(fixed: bool) -> Patient:
    flow, count = glow((3, 8, 8), scales=1, steps=2, hidden=16), 0

    def masked(layer: GlowCoupling) -> AffineCoupling:
        nonlocal count
        count += 1
        mask = channel_mask if fixed else checkerboard_mask
        return AffineCoupling(mask((12, 4, 4), count % 2), GlowNet(12, 24, hidden=16))

    ablations.glow.replace(flow, GlowCoupling, masked)
    flow.initialize(patches()[64:128])
    return Patient(flow, patches()[:ROWS])


@functools.cache
def halves() -> tuple[Tensor, Tensor]:
    """Lower and upper halves of digits, with levels 8 to 24 of 33.

    On the digits themselves, whose black and white are at the edge of the range, the doctor finds that a Glow lacks a
    logit, as the papers' Glow does.
    """
    pairs = data.digit_halves("train")
    return pairs.images + 8, pairs.contexts


def conditional(contexts: Tensor, steps: int, change: Callable[[Flow], None] = lambda flow: None) -> Patient:
    flow = cglow((1, 4, 8), (1, 4, 8), levels=33, scales=1, steps=2, hidden=16, conditioning=16)
    change(flow)
    images, _ = halves()
    flow.initialize(images[:128], contexts[:128])
    if steps:
        options = {"batch_size": 128, "clip": 50.0, "lr": 3e-3, "warmup": 30, "cosine": True, "ema": 0.98}
        fit(flow, images, steps, context=contexts, **options)
    return Patient(flow, images[:ROWS], contexts[:ROWS])


def f24(fixed: bool) -> Patient:
    lesson = chapter("06_cglow")

    def dead(flow: Flow) -> None:
        for layer in flow.modules():
            if isinstance(layer, lesson.ConditioningNetwork) and not fixed:
                lesson.all_zero(layer)

    return conditional(halves()[1], 0, dead)


@functools.cache
def trained_conditional() -> Flow:
    return conditional(halves()[1], 70).flow


def f25(fixed: bool) -> Patient:
    """A loader that mixes the pairs up, both those for training and those for the examination."""
    _, contexts = halves()
    unseen = data.digit_halves("test")
    images, others = unseen.images[:ROWS] + 8, unseen.contexts
    if fixed:
        return Patient(copy.deepcopy(trained_conditional()), images, others[:ROWS])
    flow = conditional(contexts[torch.randperm(len(contexts))], 70).flow
    return Patient(flow, images, others[torch.randperm(ROWS)])


def f25_deaf(fixed: bool) -> Patient:
    """A flow whose layers never get the context."""

    class Deaf(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def heard(self, context: Tensor) -> Tensor:
            return context if fixed else torch.zeros_like(context)

        def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return self.layers(x, self.heard(context))

        def inverse(self, z: Tensor, context: Tensor) -> Tensor:
            return self.layers.inverse(z, self.heard(context))

    images, contexts = halves()
    return Patient(Deaf(copy.deepcopy(trained_conditional()).chain).eval(), images[:ROWS], contexts[:ROWS])


def f26(fixed: bool) -> Patient:
    whole = nice(64, levels=2, couplings=2, hidden=32, depth=1)
    layers = [*whole.chain] if fixed else [layer for layer in whole.chain if not isinstance(layer, Rescale)]
    flow = Scored(layers, whole.base, whole.shape)
    flow.counted = 64 if fixed else 128  # D log 2 is subtracted though nothing was scaled
    return Patient(flow, (digits()[:ROWS].flatten(1) > 7).to(torch.uint8))


COURSE = {
    "F1": f1,
    "F2": f2,
    "F2 nothing mixes": f22_nothing,
    "F3": f3,
    "F4": f4,
    "F4 graph": f4_graph,
    "F5": f5,
    "F6": f6,
    "F7": f7,
    "F8 batch": f8_batch,
    "F8 run": f8_run,
    "F9": f9,
    "F10": f10,
    "F11": f11,
    "F12": f12,
    "F13": f13,
    "F14": f14,
    "F14 margin": f14_margin,
    "F15": f15,
    "F15 stale": f15_stale,
    "F16": f15,
    "F17": f17,
    "F18": f18,
    "F18 coarse": f18_coarse,
    "F19": f19,
    "F20": f20,
    "F20 constant": f20_constant,
    "F20 flag": f20_flag,
    "F20 no batch": f20_no_batch,
    "F21": f21,
    "F21 exponential": f21_exponential,
    "F22": f22,
    "F22 reversal": f22_reversal,
    "F23": f23,
    "F24": f24,
    "F25": f25,
    "F25 deaf": f25_deaf,
    "F26": f26,
}

# Fixed flows that equal the fixed flow of another failure: the doctor examines them once.
SAME_WHEN_FIXED = {
    "F2 nothing mixes": "F22",
    "F4": "F1",
    "F5": "F1",
    "F8 batch": "F1",
    "F8 run": "F1",
    "F9": "F1",
    "F10": "F1",
    "F14": "F15",
    "F15 stale": "F15",
    "F16": "F15",
    "F21 exponential": "F21",
    "F22 reversal": "F22",
}


@functools.cache
def findings_of(make: Callable[[bool], Patient], fixed: bool) -> list[Finding]:
    torch.manual_seed(0)
    return make(fixed).examined()


@pytest.mark.parametrize("name", COURSE)
def test_it_names_the_cause_of_each_failure_of_the_course(name: str) -> None:
    failed = [finding for finding in findings_of(COURSE[name], False) if finding.passed is False]
    assert name.split()[0] in {finding.entry for finding in failed}, failed


@pytest.mark.parametrize("name", [name for name in COURSE if name not in SAME_WHEN_FIXED])
def test_it_finds_nothing_wrong_with_the_fixed_ones(name: str) -> None:
    assert [finding for finding in findings_of(COURSE[name], True) if finding.passed is False] == []


@pytest.mark.parametrize("name", SAME_WHEN_FIXED)
def test_a_fixed_one_that_is_not_examined_is_one_that_is(name: str) -> None:
    patients = []
    for each in (name, SAME_WHEN_FIXED[name]):
        torch.manual_seed(0)
        patients.append(COURSE[each](True))
    ours, theirs = ((p.flow.state_dict(), p.batch) for p in patients)
    assert repr(patients[0].flow) == repr(patients[1].flow)
    assert patients[0].flow.training is patients[1].flow.training
    assert type(patients[0].flow.base) is type(patients[1].flow.base)
    assert (patients[0].context, patients[0].options) == (patients[1].context, patients[1].options) == (None, {})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_every_failure_of_the_course_has_a_patient() -> None:
    assert {name.split()[0] for name in COURSE} == {f"F{i}" for i in range(1, 27)}


# --- what is seen to go wrong in public code --------------------------------------------------------------------------


class OffInForward(DiagonalScaling):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))


class InPlace(Logit):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x.clone())
        x.mul_(1 - 2 * self.alpha).add_(self.alpha)
        return z, log_det


class MarginTwice(Logit):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.alpha + (1 - 2 * self.alpha) * z.sigmoid()


class WrongBothWays(AffineCoupling):
    """A log-det of the wrong sign, which a test of forward against inverse never sees."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        return z, -log_det


class EachDimension(DiagonalScaling):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x)[0], self.log_scale.expand(len(x), -1)


class OverTheBatch(AffineCoupling):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        return z, log_det.sum()


class BoundedShift(AffineCoupling):
    def _log_scale_and_shift(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale, shift = super()._log_scale_and_shift(x1, context)
        return log_scale, shift.tanh()


class Forgetting(nn.Module):
    """A flow that does not add the log-det of its second layer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.layers[0](x)
        return self.layers[1](z)[0], log_det

    def inverse(self, z: Tensor) -> Tensor:
        return self.layers[0].inverse(self.layers[1].inverse(z))


def randomised(flow: nn.Module, std: float = 0.3) -> nn.Module:
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=std)
    return flow.eval()


def on_points(*layers: nn.Module) -> Patient:
    return toy([randomised(layer) for layer in layers])


def coupling(kind: type[AffineCoupling], parity: int = 0) -> AffineCoupling:
    return kind(alternating_mask(2, parity), MLP(1, 2, hidden=16, depth=2))


class Normed(nn.Sequential):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def batch_norm_inside() -> Patient:
    networks = [Normed(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2)]
    couplings = [AffineCoupling(alternating_mask(2, i), network) for i, network in enumerate(networks)]
    return Patient(Flow(couplings, StandardNormal(), (2,)).train(), data.toy("moons", ROWS))


def five_bits() -> Patient:
    """A flow on 32 levels, scaled by 1/32 and scored with log 256."""

    class Scored256(Rescale):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().forward(x)[0], x.new_full((len(x),), -64 * math.log(256))

    flow = nice(64, levels=32, couplings=2, hidden=16, depth=1)
    layers = [flow.chain[0], Scored256(1 / 32), *flow.chain[2:]]
    return Patient(with_layers(flow, layers), torch.randint(32, (ROWS, 64)))


def deep_and_steep() -> Patient:
    layers = []
    for i in range(16):
        layers.append(AffineCoupling(alternating_mask(8, i % 2), MLP(4, 8, 32, 2)))
        nn.init.normal_(layers[-1].network.layers[-1].weight, std=0.3)
        nn.init.constant_(layers[-1].gain, 2.0)
    return Patient(Flow(layers, StandardNormal(), (8,)).eval(), torch.randn(ROWS, 8))


PUBLIC = {
    "P1 scaling in one direction": ("P1", lambda: on_points(coupling(AffineCoupling), OffInForward(2))),
    "P2 margin twice": ("P1", lambda: Patient(first(UniformDequantize(17), Rescale(1 / 17), MarginTwice()), vectors())),
    "P2 in place": ("P2", lambda: Patient(first(UniformDequantize(17), Rescale(1 / 17), InPlace()), vectors())),
    "P6 batch norm inside": ("F15", batch_norm_inside),
    "P7 bounded shift": ("F13", lambda: on_points(coupling(BoundedShift), coupling(BoundedShift, 1))),
    "P9 five bits": ("P15", five_bits),
    "P11 deep and steep": ("P11", deep_and_steep),
    "P15 sign": ("P15", lambda: on_points(coupling(WrongBothWays), coupling(AffineCoupling, 1))),
    "P15 over the batch": ("P15", lambda: on_points(coupling(OverTheBatch), coupling(OverTheBatch, 1))),
    "P15 not summed": ("P15", lambda: on_points(coupling(AffineCoupling), EachDimension(2))),
    "P15 not added": (
        "P15",
        lambda: Patient(
            randomised(Forgetting(coupling(AffineCoupling), coupling(AffineCoupling, 1))), data.toy("moons", ROWS)
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_it_names_what_goes_wrong_in_public_code(name: str) -> None:
    torch.manual_seed(0)
    entry, make = PUBLIC[name]
    failed = [finding for finding in make().examined() if finding.passed is False]
    assert entry in {finding.entry for finding in failed}, failed
    assert failed[0].entry == entry, failed  # the doctor says: fix the first failure first


# --- how it behaves ---------------------------------------------------------------------------------------------------


class TwoWays(nn.Module):
    """A foreign module, neither a Flow nor a Layer, whose inverse also returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        self.log_scale = nn.Parameter(torch.zeros(4))

    def parts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(kept), self.log_scale.sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        shift, log_det = self.parts(a)
        return torch.cat([b + shift, a], 1) * self.log_scale.exp(), log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        b, a = (z * (-self.log_scale).exp()).chunk(2, 1)
        shift, log_det = self.parts(a)
        return torch.cat([a, b - shift], 1), -log_det


def test_it_takes_any_module_with_forward_and_inverse() -> None:
    torch.manual_seed(0)
    other = TwoWays()
    findings = {finding.test: finding for finding in doctor(other, torch.randn(32, 4))}
    assert findings["round trip"].passed
    assert findings["log-det"].passed

    class Beside(TwoWays):
        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z)[0] + 0.1

    findings = {finding.test: finding for finding in doctor(Beside(), torch.randn(32, 4))}
    assert findings["round trip"].passed is False


class MaskedUnbounded(Masked):
    def log_scale(self, raw: Tensor) -> Tensor:
        return raw


class MaskedInput(Masked):
    """A coupling that masks the network's input but not its output."""

    def parts(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(x * self.mask, context).chunk(2, dim=1)
        return self.log_scale(raw), shift


def test_a_reader_s_masked_coupling_is_examined_as_the_library_s_halves_are() -> None:
    """Two flows of the same function get the same verdicts, and the mistakes of a masked one are found."""

    def masked(kind: type[Masked]) -> list[Masked]:
        return [randomised(kind(alternating_mask(8, i), MLP(8, 16, hidden=16, depth=2), affine=True)) for i in (0, 1)]

    def of(layers: list[nn.Module]) -> dict[str, Finding]:
        return found(Flow(layers, StandardNormal(), (8,)).eval(), batch)

    torch.manual_seed(0)
    batch, whole = torch.randn(64, 8), masked(Masked)
    halves = [AffineCoupling(layer.mask, MLP(4, 8, hidden=16, depth=2)) for layer in whole]
    for layer, half in zip(whole, halves, strict=True):
        checkpoint.load_into(half, layer.state_dict(), "masked")
    ours, theirs = of(halves), of(whole)
    assert {name: (test.passed, test.entry) for name, test in theirs.items()} == {
        name: (test.passed, test.entry) for name, test in ours.items()
    }
    assert theirs["round trip"].passed
    assert theirs["log-det"].passed
    assert theirs["scales"].measured == "the log-scale is bounded in 2 of 2 couplings"
    assert of(masked(MaskedUnbounded))["scales"].entry == "F12"
    assert of(masked(MaskedInput))["round trip"].entry == "F3"


def test_nothing_of_the_flow_changes(capsys: pytest.CaptureFixture[str]) -> None:
    flow = realnvp((1, 8, 8), levels=17, couplings=2, hidden=4, blocks=0).train()
    before, rng = {k: v.clone() for k, v in flow.state_dict().items()}, torch.get_rng_state()
    doctor(flow, digits()[:64])
    after = flow.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert flow.training
    assert all(p.grad is None or not p.grad.isnan().any() for p in flow.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    findings = doctor(f1(False).flow, vectors(64))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "64 examples of shape (64,), 6 layers with an inverse, training mode"
    assert printed[-1] == f"1 of {len(findings)} tests failed: fix the first failure first"
    failed = next(i for i, line in enumerate(printed) if line.startswith("✗"))
    assert re.fullmatch(r"✗ volume +no parameter moves a log-det", printed[failed])
    assert re.fullmatch(r"  cause +every learned layer keeps volume.* \[F1\]", printed[failed + 1])
    assert max(map(len, printed)) <= 110


def test_what_many_layers_share_is_said_once() -> None:
    findings = on_points(*[coupling(WrongBothWays, i % 2) for i in range(4)]).examined()
    found = [finding for finding in findings if finding.test == "log-det"]
    assert len(found) == 1
    assert found[0].measured.endswith("(3 more)")


def test_a_test_that_breaks_says_so_and_the_others_go_on() -> None:
    flow = realnvp_points(2)
    flow.bits_per_dim = lambda x: 1 / 0
    findings = {finding.test: finding for finding in doctor(flow.eval(), torch.randn(16, 2))}
    assert findings["bits/dim"].passed is None
    assert findings["bits/dim"].measured.startswith("ZeroDivisionError")
    assert findings["log-det"].passed


def test_large_images_are_compared_on_a_corner() -> None:
    torch.manual_seed(0)
    flow = glow((3, 32, 32), scales=1, steps=1, hidden=4)
    batch = torch.randint(256, (8, 3, 32, 32))
    flow.initialize(batch)
    findings = {finding.test: finding for finding in doctor(flow, batch)}
    assert findings["log-det"].passed
    assert findings["log-det"].measured.startswith("agrees with autograd in 6 layers and the whole flow")
    assert findings["masks"].passed is None
    norm = next(module for module in flow.modules() if isinstance(module, ActNorm))
    norm.forward = lambda x, context=None: (2 * x, torch.zeros(len(x)))
    assert "P15" in {finding.entry for finding in doctor(flow, batch)}


@pytest.mark.parametrize(
    ("flow", "batch", "context", "message"),
    [
        (
            nn.Linear(2, 2),
            torch.randn(8, 2),
            None,
            "flow: expected a Flow, or a module .*, got Linear",
        ),
        ("flow", torch.randn(8, 2), None, "flow: expected a Flow, or a module .*, got str"),
        (realnvp_points(2), torch.randn(7, 2), None, r"batch: .*at least 8 examples, got \(7, 2\)"),
        (realnvp_points(2), [1.0], None, r"batch: .*at least 8 examples, got list"),
        (realnvp_points(2), torch.full((8, 2), math.nan), None, "batch: expected finite values, got NaN"),
        (realnvp_points(2), torch.tensor([[math.nan, 0.0]] * 8), None, "batch: expected finite values, got NaN"),
        (realnvp_points(2), torch.randn(8, 2), torch.randn(7, 1), "context: expected one row per example, 8 in all"),
    ],
)
def test_bad_input_is_named(flow: object, batch: object, context: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doctor(flow, batch, context)


# --- behaviour that no test saw until the doctor was mutated ----------------------------------------------------------


def found(flow: nn.Module, batch: Tensor, context: Tensor | None = None, **options: object) -> dict[str, Finding]:
    return {finding.test: finding for finding in examined(flow, batch, context, **options)}


def test_of_a_layer_and_what_holds_it_the_inner_one_is_named() -> None:
    torch.manual_seed(0)
    inner = Chain([coupling(WrongBothWays), coupling(AffineCoupling, 1)])
    patient = on_points(Chain([inner]))
    measured = found(patient.flow, patient.batch)["log-det"].measured
    assert measured.startswith("layers.0.layers.0.layers.0 WrongBothWays says ")
    assert "more)" not in measured
    patient = on_points(Chain([Chain([OffInForward(2)]), coupling(AffineCoupling)]))
    measured = found(patient.flow, patient.batch)["round trip"].measured
    assert measured.startswith("layers.0.layers.0.layers.0 OffInForward: ")
    assert "more)" not in measured


def test_each_seed_is_another_noise() -> None:
    with default_dtype(torch.float64):
        case = Case(small_nice(), vectors(), None, None)
        first, same, other = (case.through(case.flow, seed=seed).z for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("x", "spacing", "levels"),
    [
        (torch.arange(64).remainder(5).view(8, 8), 1.0, 5),
        (torch.arange(64).remainder(5).view(8, 8) / 4, 0.25, 5),
        (torch.tensor([0.0, 1.0, 3.0, 4.0] * 16).view(8, 8), 1.0, 5),
        (torch.tensor([0.0, 1.0, 2.05, 3.05] * 16).view(8, 8), None, None),
        (torch.arange(64.0).view(8, 8), None, None),  # every value occurs once, so nothing shows that they are levels
        (torch.arange(4096.0).remainder(512).view(64, 64), None, None),
    ],
)
def test_the_levels_of_data(x: Tensor, spacing: float | None, levels: int | None) -> None:
    with default_dtype(torch.float64):
        case = Case(Chain([Rescale(0.5)]), x, None, None)
        assert case.spacing == spacing
        assert case.levels == levels


class BareLogit(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.logit(), -(x * (1 - x)).log().sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        return z.sigmoid()


def overflowing(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1e3)
    return layer


@pytest.mark.parametrize(
    ("flow", "value", "entry"),
    [
        (BareLogit(), 1.5, "F9"),
        (BareLogit(), -0.5, "F9"),
        (BareLogit(), 0.0, "F14"),
        (BareLogit(), 1.0, "F14"),
        (overflowing(DiagonalScaling(2)), 0.5, "F6"),
        (overflowing(Invertible1x1Conv(2, lu=False)), 0.5, "F21"),
    ],
)
def test_of_what_is_not_finite_it_names_the_cause_and_stops(flow: nn.Module, value: float, entry: str) -> None:
    x = torch.linspace(0.1, 0.9, 32).view(16, 2)
    x[3, 1] = value
    findings = examined(flow, x)
    assert [finding.test for finding in findings] == ["finite", "gradients"]
    assert findings[0].entry == entry


def test_a_log_determinant_that_is_not_finite_is_laid_to_its_layer() -> None:
    """A scale that underflows to 0 gives a finite output and an infinite log-determinant."""
    layer = GlowCoupling(2, MLP(1, 2, 4, 1))
    nn.init.constant_(layer.network.layers[-1].bias, -1e3)
    finding = doctor(layer.eval(), torch.randn(16, 2))[0]
    assert finding.measured == "GlowCoupling turns the data into NaN or infinity"


def test_a_layer_that_says_that_it_has_no_inverse_is_passed_over() -> None:
    class OneWay(DiagonalScaling):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            raise NotImplementedError("one way")

    torch.manual_seed(0)
    patient = on_points(OneWay(2), coupling(AffineCoupling))
    assert found(patient.flow, patient.batch)["round trip"].passed


@pytest.mark.parametrize("off", [1e-3, 0.1])
def test_a_round_trip_need_not_be_far_off(off: float) -> None:
    class Beside(DiagonalScaling):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return super().inverse(z) + off

    patient = on_points(Beside(2), coupling(AffineCoupling))
    assert found(patient.flow, patient.batch)["round trip"].entry == "P1"


def test_a_round_trip_from_fewer_numbers_is_a_loss() -> None:
    class Coarse(Squeeze):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z[:, :2], log_det

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return super().inverse(torch.cat([z, torch.zeros_like(z)], dim=1))

    flow = Flow([Squeeze()], StandardNormal(), (1, 4, 4))
    flow.chain.layers[0] = Coarse()
    findings = found(flow, torch.randn(64, 1, 4, 4))
    assert findings["round trip"].entry == "F18"
    assert findings["sum"].entry == "F18"


def test_the_findings_do_not_hang_on_the_random_generator() -> None:
    flow, findings = small_nice(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        findings.append(doctor(flow, vectors(16)))
    assert findings[0] == findings[1]


@pytest.mark.parametrize(("sound", "least"), [(True, 0), (False, 0), (True, 1)])
def test_mass_where_no_data_can_be_is_looked_for_in_a_sound_flow(sound: bool, least: int) -> None:
    torch.manual_seed(0)
    x = least + torch.where(torch.rand(64, 8) < 0.8, 0, torch.randint(9, (64, 8)))
    layers = [UniformDequantize(17), Rescale(1 / 17), ActNorm(8), *[Invertible1x1Conv(8)] * sound]
    flow = Flow(layers, StandardNormal(), (8,))
    flow.initialize(x)
    findings = found(flow, x)
    assert findings["masks"].passed is sound
    assert findings["samples"].entry == ("F14" if sound and not least else "")


class Claims(Rescale):
    """A scaling that claims two nats too much per value."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        return z, log_det + 2 * x[0].numel()


def test_above_the_bound_it_asks_whether_there_is_noise() -> None:
    x = (torch.arange(512).view(64, 8) % 32 == 0).long()
    bare = DiagonalScaling(8)
    nn.init.constant_(bare.log_scale, 1.5)
    assert found(bare, x.float())["D log n"].entry == "F6"
    noisy = Flow([UniformDequantize(2), Claims(0.5), DiagonalScaling(8)], StandardNormal(), (8,))
    assert found(noisy, x)["D log n"].entry == "F10"
    finding = found(DiagonalScaling(8), x / 4)["D log n"]
    assert finding.passed
    assert finding.measured.endswith("the limit 11.09")  # 8 log 4


def test_how_many_dimensions_are_counted() -> None:
    whole = small_nice()
    flow = Scored([*whole.chain], whole.base, whole.shape)
    flow.counted = 48
    assert found(flow, vectors())["bits/dim"].cause == "D is 64, but bits_per_dim counts 48"
    flow.counted = 128
    assert found(flow, vectors())["bits/dim"].entry == "F10"


def test_a_volume_that_is_not_1_is_no_lack_of_scaling() -> None:
    class Twice(DiagonalScaling):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return 2 * (x + self.log_scale), x.new_full((len(x),), 2 * math.log(2))

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return z / 2 - self.log_scale

    assert found(Twice(2), data.toy("moons", 64))["volume"].passed


class Shrinking(nn.Module):
    """A coupling whose log-scale has an upper bound and no lower bound."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 2)
        nn.init.constant_(self.network.weight, 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(x[:, :1]).chunk(2, 1)
        log_scale = nn.functional.logsigmoid(raw)
        return torch.cat([x[:, :1], x[:, 1:] * log_scale.exp() + shift], 1), log_scale.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        raw, shift = self.network(z[:, :1]).chunk(2, 1)
        return torch.cat([z[:, :1], (z[:, 1:] - shift) / raw.sigmoid()], 1)


def test_a_scale_that_can_shrink_without_limit_is_mentioned() -> None:
    torch.manual_seed(0)
    finding = found(Shrinking(), data.toy("moons", 64))["scales"]
    assert finding.passed
    assert finding.measured == "the log-scale is bounded in 0 of 1 couplings; in 1 the scale can shrink to 0"


def test_looking_at_the_scales_leaves_the_woken_copy_alone() -> None:
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        case = Case(Shrinking(), data.toy("moons", 64), None, None)
        before = [p.clone() for p in case.woken_pass.records[0].layer.parameters()]
        list(learning.scales(case))
    assert all(map(torch.equal, before, case.woken_pass.records[0].layer.parameters()))


def test_another_start_is_compared_in_training_mode() -> None:
    torch.manual_seed(0)
    norm = FlowBatchNorm(2)
    norm.running_mean.fill_(30.0)  # stale averages belong to the test of modes, not to that of the start
    couplings = [AffineCoupling(alternating_mask(2, i), MLP(1, 2, hidden=16, depth=2)) for i in (0, 1)]
    patient = toy([*couplings, norm])
    findings = found(patient.flow, patient.batch)
    assert findings["modes"].entry == "F15"
    assert findings["start"].passed


def test_a_start_is_sought_in_the_last_layer_of_the_networks() -> None:
    torch.manual_seed(0)
    layer = coupling(AffineCoupling)
    nn.init.normal_(layer.network.layers[-1].weight, std=0.3)
    nn.init.constant_(layer.network.layers[-1].bias, 5.0)
    patient = toy([layer, coupling(AffineCoupling, 1)])
    assert found(patient.flow, patient.batch)["start"].entry == "F21"


def test_averages_that_no_batch_has_moved_are_not_compared() -> None:
    patient = toy([coupling(AffineCoupling), coupling(AffineCoupling, 1), FlowBatchNorm(2)])
    assert found(patient.flow, patient.batch)["modes"].passed is None


def test_what_single_precision_cannot_hold() -> None:
    class Far(DiagonalScaling):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z + 1e7, log_det

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return super().inverse(z - 1e7)

    assert found(Far(2), data.toy("moons", 64))["precision"].entry == "P11"


def test_the_default_type_outside_is_put_back() -> None:
    with default_dtype(torch.float64):
        with default_dtype(torch.float32):
            assert torch.empty(1).dtype == torch.float32
        assert torch.empty(1).dtype == torch.float64
    assert torch.empty(1).dtype == torch.float32


class FirstBatch(DiagonalScaling):
    """A layer that takes its scale from the first batch in training mode."""

    def __init__(self, dims: int) -> None:
        super().__init__(dims)
        self.from_init = False  # an option, in addition to the flag
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialized:
            self.log_scale.data = -x.std(0).log()
            self.initialized.fill_(True)
        return super().forward(x)


def test_a_first_batch_is_company_too() -> None:
    findings = found(FirstBatch(2).train(), data.toy("moons", 64))
    assert findings["neighbours"].entry == "F15"
    assert findings["saved state"].passed


def on_images(shape: tuple[int, ...], *layers: nn.Module) -> Finding:
    torch.manual_seed(0)
    flow = Flow([randomised(layer, 0.1) for layer in layers], StandardNormal(), shape)
    return found(flow.eval(), torch.randn(16, *shape))["mixing"]


def test_which_permutations_are_too_few() -> None:
    def layers(channels: int, *more: nn.Module) -> list[nn.Module]:
        swap = ChannelPermutation(torch.arange(channels).flip(0))
        mask, network = channel_mask((channels, 4, 4), 0), ResNet(channels, 2 * channels, hidden=8, blocks=1)
        return [swap, AffineCoupling(mask, network), ChannelPermutation(torch.arange(channels).flip(0)), *more]

    assert on_images((4, 4, 4), *layers(4)).entry == "F22"
    assert on_images((2, 4, 4), *layers(2)).passed  # of two channels there is only one other order
    assert on_images((4, 4, 4), *layers(4, Invertible1x1Conv(4))).passed


def test_checkerboards_without_a_squeeze_leave_channels_to_a_convolution() -> None:
    boards = [AffineCoupling(checkerboard_mask((3, 4, 4), i), ResNet(3, 6, hidden=8, blocks=1)) for i in (0, 1)]
    assert on_images((3, 4, 4), Invertible1x1Conv(3), *boards).passed


def test_a_squeeze_takes_neighbours_and_no_others() -> None:
    class Halves(Squeeze):  # column j with column j + 2
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().forward(x[..., [0, 2, 1, 3]])

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return super().inverse(z)[..., [0, 2, 1, 3]]

    assert on_images((1, 4, 4), Halves(), Invertible1x1Conv(4)).entry == "F17"
    assert on_images((1, 4, 4), Squeeze(), Invertible1x1Conv(4)).passed


def test_draws_beyond_the_data_may_be_far_away() -> None:
    class Steep(nn.Module):
        def log_scale(self, kept: Tensor) -> Tensor:
            return -10 * (kept.abs() - 1).relu()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            log_scale = self.log_scale(x[:, :1])
            return torch.cat([x[:, :1], x[:, 1:] * log_scale.exp()], 1), log_scale.sum(1)

        def inverse(self, z: Tensor) -> Tensor:
            return torch.cat([z[:, :1], z[:, 1:] * (-self.log_scale(z[:, :1])).exp()], 1)

    torch.manual_seed(0)
    x = torch.cat([2 * torch.rand(64, 1) - 1, torch.randn(64, 1)], dim=1)
    assert found(Steep(), x)["samples"].entry == "F12"


def test_a_layer_of_the_unit_interval_is_asked_about_0() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.log(), -x.log().sum(1)

        def inverse(self, z: Tensor) -> Tensor:
            return z.exp()

    assert found(Log(), torch.linspace(0.1, 0.9, 32).view(16, 2))["edges"].entry == "F14"


def test_of_one_flow_another_base_is_another_density() -> None:
    torch.manual_seed(0)
    flow, x = TwoWays(), torch.randn(32, 4)
    by_default, logistic = (doctor(flow, x, base=base)[0].measured for base in (None, StandardLogistic()))
    assert by_default != logistic


def test_every_registered_test_is_conducted_under_its_own_name() -> None:
    for module in pkgutil.iter_modules(clinic.__path__):
        importlib.import_module(f"nflows_lib.clinic.{module.name}")
    conducted = [finding.test for finding in doctor(small_nice(), vectors())]
    assert len(set(conducted)) == len(conducted)
    assert {*conducted, report.it_runs.name} == {test.name for test in TESTS}
    assert len(TESTS) == len(conducted) + 1
    assert max(map(len, conducted)) <= 15  # the width of their column


def test_the_package_alone_does_not_wait_for_torch() -> None:
    code = "import sys, nflows_lib.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert nflows_lib.doctor is doctor is clinic.doctor
    with pytest.raises(AttributeError, match="no attribute 'surgeon'"):
        _ = nflows_lib.surgeon
