"""Settings that must stand before torch is imported and before nbval starts its kernels, which inherit them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker; results do not depend on the machine
os.environ.setdefault("NFLOWS_PROGRESS", "0")  # a progress bar's rates would never compare equal

collect_ignore = ["chapters/assets/cover.py"]  # a script: to look for its doctests would run it and redraw the cover
