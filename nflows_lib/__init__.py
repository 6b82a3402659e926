"""The library of a course on normalizing flows, from NICE to conditional Glow.

Data enter the library in :mod:`~nflows_lib.data` and go through one list of :mod:`bijections <nflows_lib.bijection>`,
from which :mod:`~nflows_lib.flow` computes the likelihood. :mod:`~nflows_lib.training` trains the flow,
:mod:`~nflows_lib.evaluation` scores it, and :mod:`~nflows_lib.plotting` draws it. Two packages build on these modules,
which import neither: ``nflows_lib.clinic`` examines a flow, ``nflows_lib.experiments`` holds named runs and ablations.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nflows_lib.clinic import check_flow, doctor

__all__ = ["check_flow", "doctor"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import ``check_flow`` or ``doctor`` at its first use, so that programs without torch need not wait for torch."""
    if name in __all__:
        from nflows_lib import clinic

        return getattr(clinic, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
