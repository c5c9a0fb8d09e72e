#!/usr/bin/env bash
# One command for the owner of a board: scripts/device_smoke.sh BUNDLE [SAMPLES] [REPORT]
# Compiles a bundle that was built on a host, judges the engine against the FP32 logits in the bundle on SAMPLES (a bundle
# holds none; left out, those it was built with are looked for where they were), and writes what happened to REPORT
# (default: device_smoke.txt). Needs edgeres with [images], tensorrt, and cuda-python or pycuda; and [cpu] where SAMPLES are
# others than the bundle was built with.
set -uo pipefail

if [[ $# -lt 1 || ! -d $1 ]]; then
    printf 'scripts/device_smoke.sh BUNDLE [SAMPLES] [REPORT]: name the folder of a bundle, such as build/digits-int8\n' >&2
    exit 2
fi
bundle=$1 samples=${2:-} report=${3:-device_smoke.txt}

if ! : >>"$report"; then
    printf 'the report cannot be written to %s: name another file\n' "$report" >&2
    exit 2
fi

step() {
    printf '\n== %s\n' "$*"
    "$@" </dev/null
    local code=$?
    printf '== exit code %d\n' "$code"
    [[ $code -eq 0 ]] || failed=1
}

failed=0
{
    date -u
    [[ -r /etc/nv_tegra_release ]] && cat /etc/nv_tegra_release
    step edgeres doctor
    step edgeres verify "$bundle"
    step edgeres compile "$bundle" --backend tensorrt
    step edgeres inspect "$bundle" --json
    step edgeres validate "$bundle" --backend tensorrt ${samples:+--validation "$samples"}
    printf '\n== %s\n' "$([[ $failed -eq 0 ]] && echo 'all good' || echo 'something failed: see above')"
    exit "$failed"
} 2>&1 | tee "$report"
codes=("${PIPESTATUS[@]}")
[[ ${codes[0]} -eq 0 && ${codes[1]} -eq 0 ]]
