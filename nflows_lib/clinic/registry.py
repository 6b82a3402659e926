"""The doctor's tests: what a test is, what it finds, and the list of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

COULD_NOT_RUN, TOO_LARGE = "could not run", "too large"
SIGNS = {True: "✓", False: "✗", None: "–", COULD_NOT_RUN: "!", TOO_LARGE: ">"}


@dataclass(frozen=True)
class Finding:
    """What one test found.

    ``passed`` is None if there is no verdict, and ``why`` says for which reason: "" if the test does not apply or only
    measures, "could not run" if an error stopped it, "too large" if it would take too long. ``measured`` says in words
    what the test measured, and ``cause`` what causes the failure. ``entry`` names the entry of the book's clinic, for
    example "F3", that shows this failure and its fix. ``test`` is the printed name of the test; the registry fills it
    in.
    """

    passed: bool | None
    measured: str
    cause: str = ""
    entry: str = ""
    test: str = ""
    why: str = ""

    def __str__(self) -> str:
        line = f"{SIGNS[self.why or self.passed]} {self.test:15} {self.measured}"
        return f"{line}\n  {'cause':15} {self.cause} [{self.entry}]" if self.entry else line


def could_not_run(what: str, error: Exception) -> Finding:
    """The finding that an error stopped a test, or its part on one layer.

    Args:
        what: what was asked, for example a layer's title; "" for a whole test.
        error: the error.
    """
    return Finding(None, f"{what}: " * bool(what) + in_one_line(error), why=COULD_NOT_RUN)


def in_one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, cut after a word if it is long."""
    words = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].split()
    line = ""
    while words and len(line) + len(words[0]) < 75:
        line += f"{words.pop(0)} "
    return line.strip() + " …" * bool(words)


@dataclass(frozen=True)
class DoctorsTest:
    """One test of the doctor: its printed name, the entries of the clinic that it may name, and its function."""

    name: str
    finds: Sequence[str]
    function: Callable[..., Finding | Iterator[Finding]]

    def __call__(self, *subject: object) -> list[Finding]:
        """The function's findings about the subject, with the name of the test filled in."""
        found = self.function(*subject)
        return [replace(finding, test=self.name) for finding in ([found] if isinstance(found, Finding) else found)]


TESTS: list[DoctorsTest] = []


def doctors_test(name: str, *, finds: Sequence[str] = ()) -> Callable[[Callable], DoctorsTest]:
    """Make a function a test of the doctor, and put it on the list of all tests.

    The function takes a :class:`~nflows_lib.clinic.examination.Case` and returns its :class:`Finding`, or yields one
    for each layer that fails or cannot be asked. The doctor runs the tests in the order of their modules in ``STAGES``
    of :mod:`nflows_lib.clinic.report`, and within a module from top to bottom.

    Args:
        name: the printed name, at most 15 characters.
        finds: every entry of the book's clinic that the test may name, for example ``["F12", "F13"]``.
    """

    def register(function: Callable) -> DoctorsTest:
        TESTS.append(DoctorsTest(name, finds, function))
        return TESTS[-1]

    return register
