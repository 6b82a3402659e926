"""The entry of ``python -m nflows_lib.notebook PATH``: see :mod:`nflows_lib.experiments.notebooks`."""

import sys

from nflows_lib.experiments.notebooks import main

if __name__ == "__main__":
    sys.exit(main())
