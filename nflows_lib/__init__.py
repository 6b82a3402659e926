"""The library of a course on normalizing flows, from NICE to conditional Glow.

Data enter at :mod:`~nflows_lib.data`. A list of :mod:`bijections <nflows_lib.bijection>` in a :mod:`~nflows_lib.flow`
turns them into a likelihood, :mod:`~nflows_lib.training` trains it, :mod:`~nflows_lib.evaluation` judges it and
:mod:`~nflows_lib.plotting` shows it. These modules import neither of the package's two wings: ``nflows_lib.clinic``
examines a flow, ``nflows_lib.experiments`` holds the named runs and ablations.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nflows_lib.clinic import doctor

__all__ = ["doctor"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import ``nflows_lib.doctor`` when it is asked for, so that what needs no torch does not wait for it."""
    if name == "doctor":
        from nflows_lib.clinic import doctor

        return doctor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
