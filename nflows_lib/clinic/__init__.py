"""The clinic: :func:`doctor` examines a flow on a batch of its own data, and names the cause of each failure it finds.

:func:`check_flow` does the same for a test suite: it prints nothing, and raises if a test fails. :func:`layer_picture`
draws what two of the tests measure in each layer.

Each test looks for one thing. The tests of round trips and log-dets ask each layer, and then the whole flow with what
its own ``forward`` does outside of its layers; random draws are held fixed meanwhile (``control.py``). The tests are
grouped in modules by subject. The decorator ``doctors_test`` in ``registry.py`` makes a function a test and declares
which entries of the book's clinic the test may name. Nothing else is needed to add a test.

Every test except *precision* works on a copy of the flow in float64. There rounding leaves errors of 1e-6 or less, so a
larger error is a mistake in the flow. Many tests look at a *woken* copy, in which every trainable parameter has been
moved at random, because a new flow is close to the identity map and hides what its layers depend on.
"""

from nflows_lib.clinic.picture import layer_picture
from nflows_lib.clinic.registry import Finding
from nflows_lib.clinic.report import check_flow, doctor

__all__ = ["Finding", "check_flow", "doctor", "layer_picture"]
