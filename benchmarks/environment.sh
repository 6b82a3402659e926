#!/usr/bin/env bash
# Adds what the benchmark compares with to .venv. `make bench` calls it when that is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

if uv --version >/dev/null 2>&1; then
    install=(uv pip install --quiet --python .venv/bin/python)
else
    install=(.venv/bin/python -m pip install --quiet)
fi

# Both are built from source, by the setuptools that is there. What they import is there, too: nflows asks for
# tensorboard and never imports it.
"${install[@]}" --no-deps --no-build-isolation --require-hashes -r benchmarks/requirements.lock
