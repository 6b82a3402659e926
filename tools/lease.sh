#!/usr/bin/env bash
# The work on a GPU that is lent for fifteen minutes, on a machine without a network: two calls, one right after the other.
# data/pretrained/README.md says how to use this script.
#
#   bash tools/lease.sh pack SETS           here: SETS is a folder with cifar10/ (two WebP sheets per batch) and unpack
#   bash tools/lease.sh first               there: the checks that need a GPU, and the first half of the data
#   bash tools/lease.sh second RUN SECONDS  there: the second half of the data; the run takes what is left of SECONDS
#   bash tools/lease.sh take FOLDER RUN     here: copy the run's record and samples from FOLDER to data/pretrained/RUN
#   bash tools/lease.sh unpack              here: go back to the branch on which pack was called
#
# DEVICE=cpu rehearses both calls here. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
FIRST=${FIRST:-180}              # seconds that the first call may take
AFTER=${AFTER:-60}               # seconds kept for the evaluation, the samples and the files that go back
DATA=${DATA:-/tmp/nflows-data}   # outside of the checkout, so that it survives a call
LEASE=.lease                     # the halves of CIFAR-10 that the calls carry, in folders 1 and 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # the library is not installed there
BEGAN=$SECONDS

pack() {
    [[ -z $(git status --porcelain) ]] || { echo "pack: expected a checkout without changes" >&2; exit 1; }
    local sets=$1 name half
    grep -qx "/$LEASE/" .git/info/exclude || echo "/$LEASE/" >>.git/info/exclude
    rm -rf "$LEASE"
    mkdir -p "$LEASE"/{1,2}/cifar10
    for name in data_batch_{1..5} test_batch; do
        for half in 0 1; do cp "$sets/cifar10/${name}_$half.webp" "$LEASE/$((half + 1))/cifar10/"; done
    done
    cp "$sets"/cifar10/{batches.meta,readme.html,side.xz} "$LEASE/1/cifar10/"
    cp "$sets/unpack" "$LEASE/1/"
    git describe --always --exclude='*' >"$LEASE/commit"
    git branch --show-current >"$LEASE/branch"
    # A GPU does not need these files, and with them half of CIFAR-10 would be more than one call carries.
    git switch --quiet --create lease
    git rm --quiet -r --ignore-unmatch data/pretrained/*/model.safetensors 'data/pretrained/*.png' 'chapters/assets/*.png'
    git commit --quiet -m "For a lent GPU: without models and pictures"
    chmod -R u+w "$LEASE"
    du -sh "$LEASE"/1 "$LEASE"/2
    echo "Carry $LEASE/1 with the first call and $LEASE/2 with the second; afterwards: bash tools/lease.sh unpack"
}

unpack() {
    git switch --quiet "$(cat "$LEASE/branch")"
    git branch --quiet -D lease
}

# Each command has its own log in $OUT. A command that has not ended when the time is over is stopped.
first() {
    export NFLOWS_PROGRESS=0 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
    local left chapter
    mkdir -p "$DATA/sets/cifar10"
    cp -r "$LEASE"/1/. "$DATA/sets/"
    # The benchmark runs alone, since it is timed.
    timeout $((FIRST / 4)) "$PYTHON" -m benchmarks.run --device "$DEVICE" --rounds 3 --seconds 0.3 \
        --out "$OUT/bench-$DEVICE.json" >"$OUT/bench.log" 2>&1 || echo "bench: did not end well, see bench.log"
    left=$((FIRST - 5 - SECONDS + BEGAN))
    # These run at the same time: they are not timed, and each keeps one core busy.
    timeout "$left" "$PYTHON" -m pytest -rP -p no:cacheprovider -m cuda tests/test_device.py >"$OUT/device.log" 2>&1 &
    for chapter in chapters/0*.ipynb; do
        timeout "$left" "$PYTHON" tests/smoke.py --device "$DEVICE" --batch-size "${BATCH:-32}" --stand-ins "$chapter" \
            >"$DATA/$(basename "$chapter" .ipynb).log" 2>&1 &
    done
    wait
    cat "$DATA"/0*.log >"$OUT/chapters.log"
    tail -n 3 "$OUT/device.log"
    grep -h 'full-run cells' "$OUT/chapters.log" || true
    for chapter in "$DATA"/0*.log; do
        grep -q 'full-run cells' "$chapter" || echo "$(basename "$chapter" .log): stopped after $left s, or failed"
    done
    echo "first call: $((SECONDS - BEGAN)) s"
}

second() {
    local run=$1 seconds=$2 budget file
    export NFLOWS_PROGRESS=0 PYTHONUNBUFFERED=1 NFLOWS_DEVICE=$DEVICE
    cp -r "$LEASE"/2/. "$DATA/sets/"
    "$PYTHON" "$DATA/sets/unpack" "$DATA" cifar10
    budget=$((seconds - AFTER - SECONDS + BEGAN))
    echo "$run: $budget s"
    "$PYTHON" -m nflows_lib train "$run" --budget "${budget}s" --save-every 1h --draws 4 --data "$DATA" --out "$DATA/run" \
        2>&1 | tee "$OUT/train.log"
    for file in run.json samples.png stages.png model.safetensors; do
        # Files over 16 MiB do not come back from the lent machine.
        [[ ! -e $DATA/run/$file || $(stat -c %s "$DATA/run/$file") -gt 16777216 ]] || cp "$DATA/run/$file" "$OUT/"
    done
    echo "second call: $((SECONDS - BEGAN)) s"
}

take() {
    local from=$1 run=$2 to=data/pretrained/$2
    mkdir -p "$to"
    cp "$from"/{run.json,samples.png,stages.png} "$to/"
    if [[ -e $from/model.safetensors && $(stat -c %s "$from/model.safetensors") -le 4194304 ]]; then
        cp "$from/model.safetensors" "$to/"
    fi
    # There is no git on the lent machine; the commit is the one that was packed.
    sed -i "s/\"commit\": \"unknown\"/\"commit\": \"$(cat "$LEASE/commit")\"/" "$to/run.json"
    echo "In $to. Next: make full-scale."
}

case ${1:-} in
    pack | first | second | take | unpack) "$@" ;;
    *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
