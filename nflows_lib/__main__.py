"""The entry of ``python -m nflows_lib train nice-digits --budget 30s``: see :mod:`nflows_lib.experiments.command`."""

import sys

from nflows_lib.experiments import command


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
