"""nflows_lib: the shared library of a course on normalizing flows, from NICE to conditional Glow.

One way through it: data enters at :mod:`~nflows_lib.data`, becomes a likelihood in :mod:`~nflows_lib.flow` by passing
one list of :mod:`bijections <nflows_lib.bijection>`, is trained in :mod:`~nflows_lib.training`, judged in
:mod:`~nflows_lib.evaluation` and shown by :mod:`~nflows_lib.plotting`. Two wings stand beside these modules, which
import neither: ``nflows_lib.clinic`` examines a flow, ``nflows_lib.experiments`` holds the named runs and ablations.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nflows_lib.clinic import doctor

__all__ = ["doctor"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``nflows_lib.doctor``, imported when it is asked for: what needs no torch should not wait for it."""
    if name == "doctor":
        from nflows_lib.clinic import doctor

        return doctor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
