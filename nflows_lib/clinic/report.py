"""The doctor: the order of its tests, and the report that it prints."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nflows_lib.clinic import bijection, images, inputs, learning, likelihood, trained, usage
from nflows_lib.clinic.control import InFloat64, default_dtype, seeded
from nflows_lib.clinic.examination import (
    EXAMPLES,
    Case,
    all_modules,
    arguments,
    as_float64,
    chain_of,
    copied,
    pair,
    unwrapped,
)
from nflows_lib.clinic.registry import (
    COULD_NOT_RUN,
    TESTS,
    DoctorsTest,
    Finding,
    could_not_run,
    doctors_test,
    in_one_line,
)
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
    report: bool = True,
) -> list[Finding]:
    """Examine a flow on a batch of its data: print what each test finds, and return the findings.

    The flow, the batch, the flow's mode and the random generator stay as they are. The doctor examines the flow in its
    present mode: call ``flow.eval()`` first, unless you want to know about training mode. Every module inside the flow
    that has an ``inverse`` and returns a pair is examined as a layer of its own, and then the whole flow.

    Args:
        flow: a :class:`~nflows_lib.flow.Flow`, or any module with a ``forward`` and an ``inverse``, with or without the
            wrapper of torch.compile, DataParallel or DistributedDataParallel. ``forward(x)`` goes from data to latent
            and returns ``(z, log_det)``, with the log_det in nats, (B,). ``inverse(z)`` returns x, or a tuple that
            begins with x. If there is a context, both take it as their second argument.
        batch: examples of the data as the flow takes them, (B, ...), at least 8; the doctor looks at the first 64.
        context: one row per example, (B, ...), if the flow is conditional: finite floats, or whole numbers such as
            labels.
        base: density of the latent, for a module that is not a Flow; the standard normal if None.
        grad_norms: lengths of the gradients of a training run as the optimizer took them (after clipping), one per
            step.
        report: whether to print.

    Returns:
        The findings in the order in which they are printed.

    Raises:
        ValueError: if flow has no forward or no inverse, if batch has fewer than 8 rows or a value that is not finite,
            or if context has another number of rows or holds a value that is not finite.

    >>> import torch
    >>> from nflows_lib.models import realnvp_points
    >>> findings = doctor(realnvp_points(2).eval(), torch.randn(64, 2))  # doctest: +ELLIPSIS
    64 examples of shape (2,), 6 layers with an inverse, evaluation mode
    ...
    nothing found
    >>> any(finding.passed is False for finding in findings)
    False
    """
    check_arguments(flow, batch, context)
    findings: list[Finding] = []
    head = ""
    with default_dtype(torch.float64), InFloat64():
        try:
            case = Case(flow, batch, context, base)
            head = _head(case)
        except Exception as error:  # an error of the reader's own module is a finding
            findings += it_runs((flow, batch, context, base), error)
        else:
            for test in IN_ORDER:
                findings += _conducted(test, case)
                case.sound = all(finding.passed is not False for finding in findings)
                if test is inputs.finite and not case.sound:
                    break  # the other tests cannot judge NaN and infinity
        findings += gradients(grad_norms)
    if report:
        print(*[head] * bool(head), *findings, _verdict(findings), sep="\n")
    return findings


def check_flow(
    flow: nn.Module,
    batch: Tensor,
    context: Tensor | None = None,
    *,
    base: Base | None = None,
    allow: Sequence[str] = (),
) -> None:
    """Examine a flow as :func:`doctor` does, print nothing, and raise if a test fails: for a test suite of your own.

    ``check_flow(MyFlow().eval(), batch)`` in a test makes the test fail with the doctor's lines as its message.

    Args:
        flow: the flow, as for :func:`doctor`.
        batch: examples of the data, (B, ...), at least 8.
        context: one row per example, if the flow is conditional.
        base: density of the latent, for a module that is not a Flow; the standard normal if None.
        allow: names of tests, as the doctor prints them, that may fail or may be unable to run.

    Raises:
        AssertionError: if a test that is not allowed to fails, or could not run.
        ValueError: if an argument is not as :func:`doctor` takes it, or allow names no test.

    >>> import torch
    >>> from nflows_lib.models import realnvp_points
    >>> check_flow(realnvp_points(2).eval(), torch.randn(64, 2))
    """
    names = [test.name for test in TESTS]
    if isinstance(allow, str) or (unknown := [name for name in allow if name not in names]):
        got = repr(allow) if isinstance(allow, str) else ", ".join(map(repr, unknown))
        raise ValueError(f"allow: expected a list of names of tests ({', '.join(names)}), got {got}")
    findings = doctor(flow, batch, context, base=base, report=False)
    wrong = [f for f in findings if f.test not in allow and (f.passed is False or f.why == COULD_NOT_RUN)]
    if wrong:
        raise AssertionError("\n".join(["the flow is not sound:", *map(str, wrong)]))


def _head(case: Case) -> str:
    """The first line of the report: what is examined, and in which mode."""
    mode = "training" if case.original.training else "evaluation"
    count = 0 if case.alone else len({id(record.layer) for record in case.data_pass.records})
    layers = f"{count or 'no'} layer{'s' * (count != 1)} with an inverse"
    return f"{len(case.x)} examples of shape {tuple(case.x.shape[1:])}, {layers}, {mode} mode"


def _verdict(findings: Sequence[Finding]) -> str:
    """The last line of the report. "Nothing found" is said only if every test that applies could run."""
    failed = {finding.test for finding in findings if finding.passed is False}
    unable = {finding.test for finding in findings if finding.why == COULD_NOT_RUN}
    total = len({finding.test for finding in findings})
    stopped = f"{len(unable)} of {total} tests could not run in full (!)"
    if failed:
        verdict = f"{len(failed)} of {total} tests failed: fix the first failure first"
        return f"{verdict}; {stopped}" if unable else verdict
    return f"no test failed, but {stopped}" if unable else "nothing found"


def check_arguments(flow: nn.Module, batch: Tensor, context: Tensor | None) -> None:
    """Raise a ValueError, as :func:`doctor` says, unless the three can be examined."""
    inside = unwrapped(flow) if isinstance(flow, nn.Module) else flow
    if not isinstance(inside, nn.Module) or not callable(getattr(chain_of(inside), "inverse", None)):
        raise ValueError(f"flow: expected a Flow, or a module with forward and inverse, got {type(flow).__name__}")
    if not isinstance(batch, Tensor) or batch.dim() < 2 or len(batch) < 8:
        got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"batch: expected a tensor (B, ...) of at least 8 examples, got {got}")
    if batch.is_floating_point() and not batch.isfinite().all():
        raise ValueError("batch: expected finite values, got NaN or infinity")
    if isinstance(context, Tensor) and not context.is_floating_point():
        context = context.to(torch.float64)  # labels, for a flow that embeds them
    check_context(context, len(batch))


@doctors_test("it runs", finds=["F4", "F20", "P2", "P15", "P17", "P18", "P21"])
def it_runs(asked: tuple, error: Exception) -> Finding:
    """What stopped the first pass of the batch, and in which layer; this test runs only if the pass failed."""
    message = str(error)
    record = _culprit(*asked)
    where = f"{record[0]}: " if record and record[0] else ""
    measured = where + in_one_line(error)
    if "computed outside of forward" in message:
        return Finding(False, measured, "the first backward frees the tensor's graph, so the second step fails", "F4")
    if message.startswith("z: expected one tensor"):
        cause = "flatten the latents and join them along dimension 1, and split them again in the inverse"
        return Finding(False, measured, cause, "P18")
    if message.startswith("log_det:") or (record and record[3]):
        cause = "return one log-det per example: sum over its dimensions, not over the batch"
        return Finding(False, measured, cause, "P15")
    if "initialize" in message:
        return Finding(
            False, measured, "the flow has seen no first batch, or the flag that says so was not saved", "F20"
        )
    if "inplace" in message or "in-place" in message or "can't be cast to the desired output type" in message:
        return Finding(
            False, measured, "an in-place operation changes what must stay: write x = x + ..., not x += ...", "P2"
        )
    if "singular" in message:
        return Finding(False, measured, "a matrix has lost its inverse: keep it away from singular ones", "P21")
    odd = _odd_size(record, asked[1])
    if odd and re.search("shape|size|dimension|multiplied|channels|divisible|must match|split", message):
        cause = f"{odd} is odd, so its halves differ in size: build each network for the half that it gets"
        return Finding(False, measured, cause, "P17")
    return Finding(False, measured)


def _odd_size(record: tuple | None, batch: Tensor) -> str:
    """What is odd about the shape that reached the failing layer, or about the batch's; "" if nothing is."""
    for shape in ([record[2]] if record and record[2] else []) + [tuple(batch.shape)]:
        if len(shape) == 2 and shape[1] % 2:
            return f"D = {shape[1]}"
        if len(shape) == 4 and (shape[2] % 2 or shape[3] % 2):
            return f"an image of {shape[2]}x{shape[3]} pixels"
        if len(shape) == 4 and shape[1] % 2:
            return f"a number of {shape[1]} channels"
    return ""


def _culprit(flow: nn.Module, batch: Tensor, context: Tensor | None, base: object) -> tuple | None:
    """The outermost layer in which a pass stops: title, type, shape of its input, whether a log-det is unsummed."""
    try:
        flow = copied(unwrapped(flow))
    except Exception:
        return None
    chain = chain_of(flow)
    running: list[tuple[str, str, tuple[int, ...]]] = []
    unsummed: list[str] = []

    def begin(name: str, layer: nn.Module, args: tuple) -> None:
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        running.append((f"{name} {type(layer).__name__}", type(layer).__name__, shape))

    def end(layer: nn.Module, args: tuple, output: object) -> None:
        title, *_ = running.pop()
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor) and output[1].dim() > 1:
            unsummed.append(title)

    for name, layer in all_modules(chain).items():
        if name:
            layer.register_forward_pre_hook(lambda m, a, name=name: begin(name, m, a))
            layer.register_forward_hook(end)
    x = as_float64(batch[:EXAMPLES])
    try:
        with torch.no_grad(), seeded(0):
            pair(chain(*arguments(x, None if context is None else as_float64(context[:EXAMPLES]))))
    except Exception:
        layers = [entry for entry in running if "Module" not in entry[1]]
        first = layers[0] if layers else ("", "", ())
        return (unsummed[0] if unsummed else first[0], first[1], first[2], bool(unsummed))
    return None


def _conducted(test: DoctorsTest, case: Case) -> list[Finding]:
    """The findings of a test, one per entry; if the test itself raises, a finding that says so."""
    try:
        with seeded(2), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a flow may warn of what the doctor does to a copy of it
            found = test(case)
    except Exception as error:
        return [replace(could_not_run("", error), test=test.name)]
    counts = Counter((finding.passed, finding.entry) for finding in found)  # one line for what many layers share
    first_of = {(finding.passed, finding.entry): finding for finding in reversed(found)}
    measured = {key: first_of[key].measured + f" ({n - 1} more)" * (n > 1) for key, n in counts.items()}
    return [replace(first_of[key], measured=text) for key, text in measured.items()]


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
