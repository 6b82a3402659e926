#!/usr/bin/env bash
# Makes .venv from requirements.lock. `make` calls it when .venv/.ready is missing or older than the lock.
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

has_uv() { uv --version >/dev/null 2>&1; }

# Prints "3.12" for a Python that can be used, else why it cannot. It is run, not looked up: a shim can be on the
# PATH and lead nowhere. Without uv it also needs ensurepip, which Debian packages apart.
probe() {
    "$1" - "$(has_uv && echo uv || echo pip)" 2>/dev/null <<'PYTHON' || echo "not found, or does not run"
import importlib.util, sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    version += ", too old or too new"
elif sys.argv[1] == "pip" and not importlib.util.find_spec("ensurepip"):
    version += " without ensurepip (on Debian: apt-get install python%s-venv)" % version
print(version)
PYTHON
}

find_python() {
    local candidate answer found=""
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        answer=$(probe "$candidate")
        if [[ $answer =~ ^3\.[0-9]+$ ]]; then
            echo "$candidate"
            return
        fi
        found+="  $candidate: $answer"$'\n'
    done
    printf 'The course needs Python 3.11, 3.12 or 3.13. Found:\n%s' "$found" >&2
    echo "Install one of them, or name it: make book PYTHON=/path/to/python3" >&2
    return 1
}

# Without the stamp an earlier set-up was interrupted: start again.
[[ -e .venv/.ready ]] || rm -rf .venv
rm -f .venv/.ready

if [[ ! -e .venv ]]; then
    python=$(find_python)
    echo "Setting up .venv with $("$python" --version), once. torch is large: this can take some minutes."
    if has_uv; then
        uv venv --quiet --python "$("$python" -c 'import sys; print(sys.executable)')" .venv
    else
        "$python" -m venv .venv
    fi
fi

# uv is several times faster than pip. If uv is missing, pip fetches the one in the lock; if that fails, pip does all.
uv=uv
if ! has_uv; then
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock >.venv/uv.txt
    .venv/bin/python -m pip install --quiet --only-binary :all: --require-hashes -r .venv/uv.txt || true
    uv=.venv/bin/uv
fi
# Bytecode is compiled here, as pip does by itself: where PYTHONDONTWRITEBYTECODE is set, every process would otherwise
# compile what it imports again, 6 seconds for torch, scikit-learn and Matplotlib.
install() {
    "$uv" pip install --quiet --compile-bytecode --python .venv/bin/python "$@" ||
        .venv/bin/python -m pip install --quiet "$@"
}

# The lock is complete, so nothing is resolved here: --no-deps. The package builds with the lock's setuptools.
install --no-deps --require-hashes -r requirements.lock
install --no-deps --no-build-isolation --editable .
touch .venv/.ready
