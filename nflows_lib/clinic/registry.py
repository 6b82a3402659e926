"""The doctor's tests: what a test is, what it finds, and the list of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Finding:
    """What one test found.

    ``passed`` is None if the test does not apply or gives no verdict. ``measured`` says in words what the test
    measured, and ``cause`` what causes the failure. ``entry`` names the entry of the book's clinic, for example "F3",
    that shows this failure and its fix. ``test`` is the printed name of the test; the registry fills it in.
    """

    passed: bool | None
    measured: str
    cause: str = ""
    entry: str = ""
    test: str = ""

    def __str__(self) -> str:
        line = f"{ {True: '✓', False: '✗', None: '–'}[self.passed] } {self.test:15} {self.measured}"
        return f"{line}\n  {'cause':15} {self.cause} [{self.entry}]" if self.entry else line


@dataclass(frozen=True)
class DoctorsTest:
    """One test of the doctor: its printed name, the entries of the clinic that it may name, and its function."""

    name: str
    finds: Sequence[str]
    function: Callable[..., Finding | Iterator[Finding]]

    def __call__(self, subject: object) -> list[Finding]:
        """The function's findings about the subject, with the name of the test filled in."""
        found = self.function(subject)
        return [replace(finding, test=self.name) for finding in ([found] if isinstance(found, Finding) else found)]


TESTS: list[DoctorsTest] = []


def doctors_test(name: str, *, finds: Sequence[str] = ()) -> Callable[[Callable], DoctorsTest]:
    """Make a function a test of the doctor, and put it on the list of all tests.

    The function takes a :class:`~nflows_lib.clinic.examination.Case` and returns its :class:`Finding`, or yields one
    for each layer that fails. The doctor runs the tests in the order of their modules in ``STAGES`` of
    :mod:`nflows_lib.clinic.report`, and within a module from top to bottom.

    Args:
        name: the printed name, at most 15 characters.
        finds: every entry of the book's clinic that the test may name, for example ``["F12", "F13"]``.
    """

    def register(function: Callable) -> DoctorsTest:
        TESTS.append(DoctorsTest(name, finds, function))
        return TESTS[-1]

    return register
