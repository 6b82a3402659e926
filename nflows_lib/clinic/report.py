"""The doctor: the order of its tests, and the report that it prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nflows_lib.clinic import bijection, images, inputs, learning, likelihood, trained, usage
from nflows_lib.clinic.examination import Case, chain_of, default_dtype
from nflows_lib.clinic.registry import TESTS, DoctorsTest, Finding, doctors_test
from nflows_lib.distributions import Base
from nflows_lib.flow import check_context

# The tests run and are printed in this order, the tests of one module from its top to its bottom. An early failure
# often causes later ones, so the first failure is the first to fix.
STAGES = (inputs, bijection, likelihood, usage, learning, images, trained)
IN_ORDER = [test for stage in STAGES for test in TESTS if test.function.__module__ == stage.__name__]


def doctor(
    flow: nn.Module,
    batch: Tensor,
    context: Tensor | None = None,
    *,
    base: Base | None = None,
    grad_norms: Sequence[float] | None = None,
) -> list[Finding]:
    """Examine a flow on a batch of its data: print what each test finds, and return the findings.

    The flow, its mode and the random generator stay as they are. The doctor examines the flow in its present mode: call
    ``flow.eval()`` first, unless you want to know about training mode. Every module inside the flow that has an
    ``inverse`` and returns a pair is examined as a layer of its own.

    Args:
        flow: a :class:`~nflows_lib.flow.Flow`, or any module with a ``forward`` and an ``inverse``. ``forward(x)`` goes
            from data to latent and returns ``(z, log_det)``, with the log_det in nats, (B,). ``inverse(z)`` returns x,
            or a tuple that begins with x. If there is a context, both take it as their second argument.
        batch: examples of the data as the flow takes them, (B, ...), at least 8; the doctor looks at the first 64.
        context: one row per example, (B, ...), if the flow is conditional.
        base: density of the latent, for a module that is not a Flow; the standard normal if None.
        grad_norms: lengths of the gradients of a training run as the optimizer took them (after clipping), one per
            step.

    Returns:
        The findings in the order in which they are printed.

    Raises:
        ValueError: if flow has no forward or no inverse, if batch has fewer than 8 rows or a value that is not finite,
            or if context has another number of rows or does not hold finite floats.

    >>> import torch
    >>> from nflows_lib.models import realnvp_points
    >>> findings = doctor(realnvp_points(2).eval(), torch.randn(64, 2))  # doctest: +ELLIPSIS
    64 examples of shape (2,), 6 layers with an inverse, evaluation mode
    ...
    nothing found
    >>> any(finding.passed is False for finding in findings)
    False
    """
    _check(flow, batch, context)
    findings: list[Finding] = []
    with default_dtype(torch.float64):
        try:
            case = Case(flow, batch, context, base)
            mode = "training" if flow.training else "evaluation"
            count = len({id(record.layer) for record in case.data_pass.records})
            shape = tuple(batch.shape[1:])
            print(f"{len(case.x)} examples of shape {shape}, {count} layers with an inverse, {mode} mode")
        except Exception as error:  # an error of the reader's own module is a finding
            findings += it_runs(error)
        else:
            for test in IN_ORDER:
                findings += _conducted(test, case)
                case.sound = all(finding.passed is not False for finding in findings)
                if test is inputs.finite and not case.sound:
                    break  # the other tests cannot judge NaN and infinity
        findings += gradients(grad_norms)
    for finding in findings:
        print(finding)
    failed = sum(finding.passed is False for finding in findings)
    print(f"{failed} of {len(findings)} tests failed: fix the first failure first" if failed else "nothing found")
    return findings


def _check(flow: nn.Module, batch: Tensor, context: Tensor | None) -> None:
    if not isinstance(flow, nn.Module) or not callable(getattr(chain_of(flow), "inverse", None)):
        raise ValueError(f"flow: expected a Flow, or a module with forward and inverse, got {type(flow).__name__}")
    if not isinstance(batch, Tensor) or batch.dim() < 2 or len(batch) < 8:
        got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"batch: expected a tensor (B, ...) of at least 8 examples, got {got}")
    if batch.is_floating_point() and not batch.isfinite().all():
        raise ValueError("batch: expected finite values, got NaN or infinity")
    check_context(context, len(batch))


@doctors_test("it runs", finds=["F4", "F20", "P15"])
def it_runs(error: Exception) -> Finding:
    """What stopped the first pass of the batch through the flow; this test runs only if the pass failed."""
    message = str(error).partition("\n")[0]
    cause = entry = ""
    if "computed outside of forward" in message:
        cause, entry = "the first backward frees the tensor's graph, so the second step fails", "F4"
    elif "log_det" in message:
        cause, entry = "return one log-det per example: sum over its dimensions, not over the batch", "P15"
    elif "initialize" in message:
        cause, entry = "the flow has seen no first batch, or the flag that says so was not saved", "F20"
    return Finding(False, f"{type(error).__name__}: {message}", cause, entry)


def _conducted(test: DoctorsTest, case: Case) -> list[Finding]:
    """The findings of a test, one per entry; if the test itself raises, a finding that says so."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            found = test(case)
    except Exception as error:
        message = str(error).partition("\n")[0][:100]
        return [Finding(None, f"{type(error).__name__}: {message}", test=test.name)]
    counts = Counter(finding.entry for finding in found)  # a failure that many layers share is printed once
    first_of = {finding.entry: finding for finding in reversed(found)}
    measured = {entry: first_of[entry].measured + f" ({n - 1} more)" * (n > 1) for entry, n in counts.items()}
    return [replace(first_of[entry], measured=text) for entry, text in measured.items()]


@doctors_test("gradients", finds=["F11"])
def gradients(grad_norms: Sequence[float] | None) -> Finding:
    """Whether the longest gradient that the optimizer took is at most ten times as long as the median one."""
    if not grad_norms:
        return Finding(None, "no grad_norms were given")
    values = torch.as_tensor(list(grad_norms), dtype=torch.float64)
    ratio = (values.max() / values.median()).nan_to_num(nan=math.inf).item()
    measured = f"the longest gradient is {ratio:.3g} times as long as the median one"
    if ratio > 10:
        return Finding(False, measured, "Adam remembers it and shortens later steps: clip the gradients", "F11")
    return Finding(True, measured)
