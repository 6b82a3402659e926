"""The doctor's report: its lines, its verdict, check_flow, and what it says of a flow that does not run."""

from __future__ import annotations

import math

import pytest
import torch
from flows import Columns, Coupling, Steps, couplings, moved, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import Finding, doctor, inputs, report
from nflows_lib.clinic.control import InFloat64, default_dtype
from nflows_lib.clinic.examination import Case
from nflows_lib.clinic.registry import COULD_NOT_RUN, SIGNS, TESTS, TOO_LARGE, could_not_run, doctors_test, in_one_line
from nflows_lib.clinic.report import check_flow

# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finding", "sign"),
    [
        (Finding(True, "measured", test="name"), "✓"),
        (Finding(False, "measured", test="name"), "✗"),
        (Finding(None, "measured", test="name"), "–"),
        (Finding(None, "measured", test="name", why=COULD_NOT_RUN), "!"),
        (Finding(None, "measured", test="name", why=TOO_LARGE), ">"),
    ],
)
def test_each_kind_of_finding_has_its_sign(finding: Finding, sign: str) -> None:
    assert str(finding) == f"{sign} name            measured"
    assert sign in SIGNS.values()
    assert len({*SIGNS.values()}) == 5


def test_a_cause_has_a_line_of_its_own() -> None:
    finding = Finding(False, "measured", "cause", "F3", test="round trip")
    assert str(finding) == "✗ round trip      measured\n  cause           cause [F3]"


def test_a_message_is_cut_after_a_word() -> None:
    assert in_one_line(ValueError("short")) == "ValueError: short"
    assert in_one_line(ValueError("first line\nsecond line")) == "ValueError: first line"
    assert in_one_line(ValueError("")) == "ValueError:"
    words = [f"word{i}" for i in range(40)]
    line = in_one_line(RuntimeError(" ".join(words)))
    assert line.endswith(" …")
    assert len(line) <= 77
    assert line.removesuffix(" …").split()[1:] == words[: len(line.split()) - 2]


def test_what_could_not_run_has_no_verdict() -> None:
    finding = could_not_run("steps.0 Columns", KeyError("x"))
    assert (finding.passed, finding.why, finding.entry) == (None, COULD_NOT_RUN, "")
    assert finding.measured == "steps.0 Columns: KeyError: 'x'"
    assert could_not_run("", KeyError("x")).measured == "KeyError: 'x'"


def test_a_test_fills_in_its_name_and_may_yield() -> None:
    before = list(TESTS)
    try:

        @doctors_test("made up", finds=["F1"])
        def one(case: object) -> Finding:
            return Finding(True, "fine")

        @doctors_test("several")
        def several(case: object) -> object:
            yield Finding(True, "first")
            yield Finding(None, "second")

        assert TESTS == [*before, one, several]
        assert one(None) == [Finding(True, "fine", test="made up")]
        assert [finding.test for finding in several(None)] == ["several"] * 2
    finally:
        TESTS[:] = before


GOOD = Finding(True, "", test="a")
BAD = Finding(False, "", test="b")
UNABLE = Finding(None, "", test="c", why=COULD_NOT_RUN)
LARGE = Finding(None, "", test="d", why=TOO_LARGE)


@pytest.mark.parametrize(
    ("findings", "last"),
    [
        ([GOOD], "nothing found"),
        ([GOOD, Finding(None, "", test="b")], "nothing found"),
        ([GOOD, LARGE], "nothing found"),
        ([GOOD, BAD], "1 of 2 tests failed: fix the first failure first"),
        ([GOOD, BAD, BAD], "1 of 2 tests failed: fix the first failure first"),
        ([GOOD, UNABLE], "no test failed, but 1 of 2 tests could not run in full (!)"),
        (
            [GOOD, UNABLE, UNABLE, Finding(True, "", test="c")],
            "no test failed, but 1 of 2 tests could not run in full (!)",
        ),
        (
            [GOOD, BAD, UNABLE],
            "1 of 3 tests failed: fix the first failure first; 1 of 3 tests could not run in full (!)",
        ),
    ],
)
def test_the_last_line(findings: list[Finding], last: str) -> None:
    assert report._verdict(findings) == last


@pytest.mark.parametrize(("layers", "said"), [(0, "no layers"), (1, "1 layer"), (3, "3 layers")])
def test_the_first_line_counts_the_layers(layers: int, said: str) -> None:
    flow = moved(Steps(*[Columns() for _ in range(layers)])) if layers else Columns().eval()
    with default_dtype(torch.float64), InFloat64():
        line = report._head(Case(flow, points(), None, None))
    assert line == f"16 examples of shape (4,), {said} with an inverse, evaluation mode"


def test_what_several_layers_share_is_said_once_and_unlike_findings_are_kept() -> None:
    @doctors_test("shared", finds=["P1", "F3"])
    def shared(case: object) -> object:
        for entry in ("P1", "P1", "F3", "P1"):
            yield Finding(False, f"one of {entry}", "cause", entry)
        yield Finding(True, "the others are right")

    TESTS.remove(shared)
    found = report._conducted(shared, None)
    assert [(finding.measured, finding.entry) for finding in found] == [
        ("one of P1 (2 more)", "P1"),
        ("one of F3", "F3"),
        ("the others are right", ""),
    ]


# --- a whole report ---------------------------------------------------------------------------------------------------


def test_a_report_of_a_sound_flow_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    flow, x = Columns().eval(), points()
    findings = doctor(flow, x)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "16 examples of shape (4,), no layers with an inverse, evaluation mode"
    assert len(lines) == len(findings) + 2 + sum(bool(finding.entry) for finding in findings)
    assert all(line[:2] in {f"{sign} " for sign in SIGNS.values()} | {"  "} for line in lines[1:-1])
    assert doctor(flow, x, report=False) == findings
    assert capsys.readouterr().out == ""


def test_a_test_that_could_not_run_is_not_counted_as_passed(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Columns):
        def bits_per_dim(self, x: Tensor) -> Tensor:
            raise KeyError("levels")

    flow = moved(Steps(*couplings(), Columns()))
    flow.bits_per_dim = Odd().bits_per_dim
    findings = doctor(flow, points())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"no test failed, but 1 of {len(findings)} tests could not run in full (!)"
    with pytest.raises(AssertionError, match=r"the flow is not sound:\n! bits/dim +KeyError: 'levels'"):
        check_flow(flow, points())


def test_check_flow(capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(Columns):
        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return super().inverse(z) + 1

    bent = moved(Wrong())
    with pytest.raises(AssertionError, match=r"the flow is not sound:\n✗ round trip +Wrong: .*\n +cause .*\[P1\]"):
        check_flow(bent, points(), allow=["start", "masks", "log-det"])
    check_flow(bent, points(), allow=["round trip", "start", "masks", "samples"])
    assert capsys.readouterr().out == ""
    for allow, got in ((["round trips"], "got 'round trips'"), ("round trip", "got 'round trip'")):
        with pytest.raises(ValueError, match="allow: expected a list of names of tests .*" + got):
            check_flow(bent, points(), allow=allow)


def test_labels_may_be_the_context() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(3, 2), Steps(*couplings(context=2))

        def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x, self.embedding(label))

        def inverse(self, z: Tensor, label: Tensor) -> Tensor:
            return self.body.inverse(z, self.embedding(label))

    labels = torch.arange(16) % 3
    findings = {finding.test: finding for finding in doctor(moved(Labelled()), points(), labels, report=False)}
    assert findings["round trip"].passed
    assert findings["log-det"].passed
    assert "log p(x) does not depend" not in findings["context"].measured
    assert not any(finding.why == COULD_NOT_RUN for finding in findings.values())


def test_a_float64_batch_stays_what_it_is_under_an_in_place_flow() -> None:
    class InPlace(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            x *= self.log_scale.exp().detach()
            return x + self.shift, self.log_scale.sum().expand(len(x))

    x, context = points().double(), points(dims=2).double()
    before = x.clone(), context.clone()
    findings = doctor(moved(Steps(InPlace(), *couplings())).double(), x, report=False)
    assert next(finding for finding in findings if finding.test == "input").entry == "P2"
    assert torch.equal(x, before[0])
    assert torch.equal(context, before[1])


# --- a flow that does not run -----------------------------------------------------------------------------------------


def it_runs(flow: nn.Module, batch: Tensor, context: Tensor | None = None) -> Finding:
    """The doctor's first finding of a flow that stops, which is its only one but for the gradients."""
    findings = doctor(flow, batch, context, report=False)
    assert [finding.test for finding in findings] == ["it runs", "gradients"]
    assert findings[0].passed is False
    return findings[0]


class Halves(nn.Module):
    """A coupling that takes for granted that the number of dimensions is even."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.network = nn.Linear(dims // 2, dims // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        return torch.cat([a, b + self.network(a)], 1), torch.zeros(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        a, b = z.chunk(2, 1)
        return torch.cat([a, b - self.network(a)], 1)


def test_an_odd_number_of_dimensions() -> None:
    found = it_runs(Steps(Columns(5), Halves(5)), points(dims=5))
    assert found.entry == "P17"
    assert found.measured.startswith("steps.1 Halves: RuntimeError: ")
    assert found.cause.startswith("D = 5 is odd, so its halves differ in size")


def test_an_image_of_odd_size_and_an_odd_number_of_channels() -> None:
    class Squeeze(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return nn.functional.pixel_unshuffle(x, 2), torch.zeros(len(x))

        def inverse(self, z: Tensor) -> Tensor:
            return nn.functional.pixel_shuffle(z, 2)

    found = it_runs(Steps(Squeeze()), points(16, 15).view(16, 1, 5, 3))
    assert found.entry == "P17"
    assert found.cause.startswith("an image of 5x3 pixels is odd")

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x.chunk(2, 1)
            return torch.cat([a, b + self.network(a)], 1), torch.zeros(len(x))

        def inverse(self, z: Tensor) -> Tensor:
            return z

    found = it_runs(Steps(Channels()), points(16, 12).view(16, 3, 2, 2))
    assert found.entry == "P17"
    assert found.cause.startswith("a number of 3 channels is odd")


@pytest.mark.parametrize("kind", [list, tuple])
def test_latents_in_a_list(kind: type) -> None:
    class Several(Steps):
        def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
            z, log_det = super().forward(x)
            return kind(z.chunk(2, 1)), log_det

    found = it_runs(moved(Several(*couplings())), points())
    assert found.entry == "P18"
    assert f"got the latents as a {kind.__name__} of 2" in found.measured
    assert "flatten the latents and join them" in found.cause


class Stops(Columns):
    """A layer that stops with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "entry"),
    [
        (RuntimeError("linalg.inv: the matrix is singular"), "P21"),
        (RuntimeError("a leaf Variable that requires grad is being used in an in-place operation"), "P2"),
        (RuntimeError("call initialize() first"), "F20"),
        (KeyError("what"), ""),
    ],
)
def test_what_stopped_is_named_with_its_layer(error: Exception, entry: str) -> None:
    found = it_runs(Steps(Coupling(), Steps(Columns(), Stops(error))), points())
    assert found.entry == entry
    assert found.measured.startswith("steps.1")
    assert type(error).__name__ in found.measured


def test_log_dets_that_are_not_summed() -> None:
    class Unsummed(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x)[0], self.log_scale.expand(len(x), -1)

    found = it_runs(moved(Steps(Coupling(), Unsummed())), points())
    assert found.entry == "P15"
    assert found.measured.startswith("steps.1 Unsummed: ")
    assert found.cause == "return one log-det per example: sum over its dimensions, not over the batch"


def test_a_forward_that_returns_no_pair() -> None:
    class Single(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> Tensor:
            return x

    found = it_runs(Single(), points())
    assert found.measured.endswith("got Tensor")
    assert "sum over its dimensions" not in found.cause


def test_a_base_of_another_shape() -> None:
    class Each:
        def log_prob(self, z: Tensor) -> Tensor:
            return -z.square()

    findings = doctor(sound(), points(), base=Each(), report=False)
    assert findings[0].test == "it runs"
    assert "base: expected log_prob of shape (16,), got (16, 4)" in findings[0].measured


def test_what_is_not_finite_ends_the_examination(capsys: pytest.CaptureFixture[str]) -> None:
    class Overflows(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z * math.inf, log_det

    findings = doctor(moved(Steps(Coupling(), Overflows())), points())
    assert [finding.test for finding in findings] == [inputs.finite.name, "gradients"]
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 2 tests failed: fix the first failure first"
