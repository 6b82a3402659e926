"""The entry of ``python -m nflows_lib.ablations [NAME ...]``: see :mod:`nflows_lib.experiments.ablations`."""

from nflows_lib.experiments.ablations import main

if __name__ == "__main__":
    main()
