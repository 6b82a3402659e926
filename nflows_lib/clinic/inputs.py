"""Tests of the input: whether the flow stays finite, leaves its input unchanged, and gets data that have a density."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflows_lib.clinic.control import HeldNoise, seeded
from nflows_lib.clinic.examination import LARGEST, Case, Record, all_modules, relative_error
from nflows_lib.clinic.registry import Finding, doctors_test

BEYOND = torch.finfo(torch.float32).max  # larger numbers are infinite in float32, in which flows are trained
_OVERLAP = "levels overlap: the noise is too wide, or is added twice"
ONE = 1 - 2**-40  # the largest draw of a uniform generator, as far as the doctor is concerned


@doctors_test("finite", finds=["F6", "F9", "F14", "F20", "F21", "P15", "P22", "P23", "P26"])
def finite(case: Case) -> Finding:
    """Whether every number is finite, and which layer is the first to return NaN or infinity."""
    for record in case.data_pass.leaves:
        if not _is_finite(record):
            return Finding(False, f"{record.title} turns the data into NaN or infinity", *_cause_of_nan(record))
    done = case.data_pass
    low, high = done.log_p.min(), done.log_p.max()
    if (done.log_p.abs() < BEYOND).all():
        return Finding(True, f"log p(x) is between {low:.4g} and {high:.4g} nats")
    if _is_finite(done.whole):
        lost = (~done.log_p.isfinite()).sum().item()
        measured = f"the base density is 0 or NaN at {lost} of {len(done.z)} latents, which are finite"
        return Finding(False, measured, "the latents leave the support of the base density", "P23")
    most = done.z.abs().max()
    if case.alone or not done.records or done.gapless:
        cause = "values grow from layer to layer: start the networks' last layers at zero"
        return Finding(False, f"log p(x) is not finite, and the largest latent is {most:.2g}", cause, "F21")
    return Finding(False, "forward returns NaN or infinity, its layers do not", *_cause_of_nan(done.whole))


def _is_finite(record: Record) -> bool:
    return bool((record.z.abs() < BEYOND).all() and (record.log_det.abs() < BEYOND).all())


def _cause_of_nan(record: Record) -> tuple[str, str]:
    """The cause and the entry of a NaN or infinity that a layer, or the whole flow, returns for finite numbers."""
    values = record.x.transpose(0, 1).flatten(1)
    constant = (values.amin(1) == values.amax(1)).any()
    if record.z.isfinite().all() and record.log_det.isnan().all() and record.learned:
        squares = [p.flatten(1) for p in record.layer.parameters() if p.dim() > 1 and p[0].numel() == len(p)]
        if any(torch.linalg.det(p) < 0 for p in squares):
            return "the logarithm of a negative determinant is NaN: use slogdet", "P15"
        return "the logarithm of a negative number is NaN: take that of its absolute value", "P15"
    with HeldNoise() as watched, torch.no_grad():
        record.again(record.x)
    if watched.half:
        return "it computes in float16, which ends at 65,504, or in bfloat16: keep log-dets and sums in float32", "P26"
    if _normalises_zeros(record.layer):
        return "weight normalisation divides a weight of zeros by its norm: start it at small numbers", "P22"
    if not record.learned:
        if values.min() < 0 or values.max() > 1:
            return f"its input, from {values.min():.4g} to {values.max():.4g}, leaves the unit interval", "F9"
        return "the logit of exactly 0 or 1 is infinite: keep a margin", "F14"
    if constant:
        return "a channel is constant: no scale gives it a variance of 1", "F20"
    if record.is_elementwise():
        return "a scale has grown without limit, as it does on data without noise", "F6"
    return "a scale overflows: bound it, and start the networks' last layers at zero", "F21"


def _normalises_zeros(layer: nn.Module) -> bool:
    """Whether a weight of the layer is normalised, and the norm of one of its rows is 0."""
    for module in all_modules(layer).values():
        directions = [p for name, p in module.named_parameters(recurse=False) if name in ("original1", "weight_v")]
        if any((direction.flatten(1) == 0).all(1).any() for direction in directions):
            return True
    return False


@doctors_test("input", finds=["P2"])
def in_place(case: Case) -> Finding:
    """Whether a layer changes its input in place."""
    for record in [*case.data_pass.inner_first, case.data_pass.whole]:
        if record.overwritten:
            measured = f"{record.title} changes its input in place"
            return Finding(False, measured, "the data, or another layer's input, are destroyed: make a copy", "P2")
    return Finding(True, "no layer changes its input in place")


@doctors_test("noise", finds=["F6", "F7", "F8"])
def noise(case: Case) -> Finding:
    """Whether discrete data get noise that fills each step, whether every value gets its own, and stays real numbers."""
    noise, x = case.noise, case.x
    if not case.random and case.spacing is not None:
        shifted = [record for record in case.data_pass.records if _adds_one_vector(record)]
        if shifted:
            measured = f"{shifted[0].title} adds the same numbers to every example, at every call"
            return Finding(False, measured, "a shifted grid is still a grid: draw noise for each value", "F8")
        measured = f"the data lie on a grid of step {case.spacing:.4g}, and the flow adds no noise"
        return Finding(False, measured, "a density has no best value on a grid: dequantize the data", "F6")
    who = noise.title if noise else "forward"
    if case.random and case.spacing is not None:
        with torch.no_grad(), seeded(0):
            of = noise.again if noise else lambda rows: (case.through(case.flow, rows).z, None)
            example = (noise or case.data_pass.whole).x[:1]
            rows, _ = of(example.expand(8, *example.shape[1:]))
        if torch.equal(rows, rows[:1].expand_as(rows)):
            measured = f"{who} gives eight copies of an example the same noise"
            return Finding(False, measured, "one noise vector serves the whole batch: draw noise for each value", "F8")
    wrong = _wrong_width(case) if case.random and case.spacing is not None else None
    if wrong is not None and wrong.cause == _OVERLAP:
        return wrong
    if not case.random or noise is not None:
        noisy = x if noise is None else noise.z
        values, counts = noisy.unique(return_counts=True)
        share = counts.max().item() / noisy.numel()
        if counts.max() > 3 and share > 0.005:
            measured = (
                f"{100 * share:.1f} % of the values that enter the flow are exactly {values[counts.argmax()]:.4g}"
            )
            also = "" if noise is not None else ", or the data are discrete in part"
            return Finding(False, measured, f"the values are clamped after the noise{also}", "F7")
    if wrong is not None:
        return wrong
    return Finding(True, f"{who} draws noise for every value" if case.random else "the data are real numbers")


def _adds_one_vector(record: Record) -> bool:
    """Whether a layer without parameters adds the same vector of unequal numbers to every example of integers."""
    if record.x.shape != record.z.shape or record.learned:
        return False
    added = record.z - record.x
    same = (added - added[:1]).abs().max() < 1e-9
    return bool(same and added.flatten(1)[0].std() > 1e-3 and torch.equal(record.x, record.x.round()))


def _wrong_width(case: Case) -> Finding | None:
    """What is wrong with the width of the noise on discrete data; None if nothing is, or if the noise is learned.

    Noise is right if the largest draw on one level leads to the same latent as the smallest draw on the next level.
    """
    if case.noise is not None and case.noise.learned:
        return None
    if not any(torch.Size(shape).numel() == case.x.numel() for shape in case.draws.uniform):
        if any(torch.Size(shape).numel() == case.x.numel() for shape in case.draws.normal):
            measured = "the noise on the levels is normal, not uniform"
            return Finding(False, measured, "normal noise leaves gaps or overlaps: draw it uniform on one step", "F6")
        return None
    x, context = case.rows(slice(0, 4))
    x = x.to(torch.float64).clamp(max=case.x.max().item() - case.spacing)

    def latent(steps: float, level: float) -> Tensor:
        with torch.no_grad(), HeldNoise(level):
            return case.through(case.flow, x + steps * case.spacing, context).z

    top = latent(0, ONE)

    def miss(steps: float) -> float:
        return relative_error(latent(steps, 0.0), top)

    if miss(1.0) < 1e-5:
        return None
    guesses = [*(2.0 ** (k / 2) for k in range(-18, 5)), 1 / 255, 1 / case.levels, 1 / (case.levels - 1), 0.0]
    width = min(guesses, key=miss)
    for _ in range(10):  # Gauss and Newton: the width whose latents are nearest to those of the largest draw
        here = latent(width, 0.0)
        slope = (latent(width + 1e-6, 0.0) - here) / 1e-6
        width += ((slope * (top - here)).sum() / slope.square().sum()).item()
    if miss(width) > 0.01:
        measured = "the noise does not take one level to the next"
        return Finding(False, measured, "a layer before the noise moves the levels: put the noise first", "F6")
    measured = f"the noise is {width:.3g} steps wide, a step being {case.spacing:.3g}"
    if abs(width - 1) < 0.02:
        return None
    if width < 1:
        return Finding(False, measured, "the data are almost as discrete as before: fill the whole step", "F6")
    return Finding(False, measured, _OVERLAP, "F6")


@doctors_test("columns", finds=["F28"])
def columns(case: Case) -> Finding:
    """Whether a column of real-valued data is constant, repeats another one, or is a linear function of others."""
    x = case.everything.cpu().flatten(1)[:4096]
    if case.spacing is not None or case.random or not x.is_floating_point():
        return Finding(None, "the data are discrete, or get noise")
    if case.dims > LARGEST:
        return Finding(None, f"{case.dims} columns are too many to compare", why="too large")
    x = x.to(torch.float64)
    deviation = x.std(0)
    if (deviation <= 1e-12 * x.abs().amax(0)).any():
        which = (deviation <= 1e-12 * x.abs().amax(0)).nonzero()[0].item()
        measured = f"column {which} is constant"
        return Finding(False, measured, "the density on a constant has no maximum: drop the column", "F28")
    standard = (x - x.mean(0)) / deviation
    correlation = standard.T @ standard / (len(x) - 1)
    close = (correlation.abs() > 1 - 1e-11).fill_diagonal_(False).nonzero()
    if len(close):
        measured = f"column {close[0][1].item()} is a linear function of column {close[0][0].item()}"
        return Finding(False, measured, "the data fill fewer dimensions than D: drop the column", "F28")
    if len(x) > case.dims + 1 and torch.linalg.eigvalsh(correlation)[0] < 1e-11:
        weights = torch.linalg.eigh(correlation).eigenvectors[:, 0].abs()
        which = (weights > 0.05 * weights.max()).nonzero().flatten().tolist()
        measured = f"columns {', '.join(map(str, which[:6]))} are linearly dependent"
        return Finding(False, measured, "the data fill fewer dimensions than D: drop a column", "F28")
    return Finding(True, "no column is constant or a linear function of others")
