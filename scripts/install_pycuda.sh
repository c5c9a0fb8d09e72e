#!/usr/bin/env bash
# Install pycuda into the active Python, on a machine with neither a GPU nor a CUDA toolkit: scripts/install_pycuda.sh [CACHE]
# The tests need it. Where a toolkit is, `pip install pycuda` does; that is the way on a Jetson.
#
# pycuda comes as sources only. What they need beyond a C++ compiler: two headers, which NVIDIA publishes as small
# packages, and a libcuda.so to name at link time, for which an empty one is enough. The wheel is kept in CACHE
# (default: ${XDG_CACHE_HOME:-~/.cache}/edgeres/wheels) for each Python; building one takes some minutes.
set -euo pipefail

version=2026.1
headers=(nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-profiler-api-cu12==12.9.79)
cache=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/edgeres/wheels}

fail() {
    printf 'scripts/install_pycuda.sh: %s\n' "$*" >&2
    exit 1
}

pip() { python -m pip --disable-pip-version-check --quiet "$@"; }

install_cached() {
    local wheel
    for wheel in "$cache/$tag/pycuda-$version-"*.whl; do
        [[ -e $wheel ]] || return 1
        pip install "$wheel" || fail "pip cannot install $wheel. Delete that file and run this again."
    done
}

build() {
    local start=$SECONDS compiler=${CXX:-c++} found
    command -v "$compiler" >/dev/null || fail "no C++ compiler ($compiler). Install one: apt-get install g++"
    python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "$(python --version) has no headers (Python.h). Install them: apt-get install python3-dev"

    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    pip install --no-deps --target "$work/cuda" "${headers[@]}" || fail "pip cannot install ${headers[*]}; see above."
    pip download --no-deps --no-binary pycuda --dest "$work" "pycuda==$version" || fail "pip cannot fetch pycuda; see above."
    tar -xzf "$work/pycuda-$version.tar.gz" -C "$work"
    mkdir "$work/stub"
    "$compiler" -shared -Wl,-soname,libcuda.so.1 -o "$work/stub/libcuda.so" -x c++ /dev/null ||
        fail "$compiler cannot make a shared library; see above."

    found=$(find "$work/cuda" -name cuda.h -o -name cudaProfiler.h)
    [[ $(wc -l <<<"$found") -eq 2 ]] || fail "${headers[*]} lack a header; they hold: ${found:-none}"
    # Not optimized: compiling then takes half as long, and the tests wait for nothing in it.
    cat >"$work/pycuda-$version/siteconf.py" <<CONFIG
CUDA_ENABLE_CURAND = False
CUDA_INC_DIR = [$(while read -r header; do printf '"%s", ' "$(dirname "$header")"; done <<<"$found")]
CUDADRV_LIB_DIR = ["$work/stub"]
CXXFLAGS = ["-O0", "-g0", "-w"]
CONFIG
    # Without this flag some linkers leave out a library that defines nothing, and pycuda would not ask for libcuda.so.1.
    LDFLAGS="-Wl,--no-as-needed ${LDFLAGS-}" \
        pip wheel --no-deps --wheel-dir "$work/wheel" "$work/pycuda-$version" >"$work/log" 2>&1 ||
        { tail -n 60 "$work/log" >&2 && fail "pycuda does not build; its last words are above."; }
    # Moved at once, so that nobody finds half a wheel.
    mkdir -p "$cache/$tag"
    cp "$work/wheel"/*.whl "$cache/$tag/new.$$"
    mv -f "$cache/$tag/new.$$" "$cache/$tag/$(basename "$work/wheel"/*.whl)"
    printf 'scripts/install_pycuda.sh: built pycuda %s for %s in %s s\n' "$version" "$tag" "$((SECONDS - start))" >&2
}

command -v python >/dev/null || fail "no python on the PATH. Activate an environment first."
# Several Pythons and machines may share a cache: cpython-311-x86_64-linux-gnu, for instance.
tag=$(python -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')

if python -c "import pycuda, sys; sys.exit(pycuda.VERSION_TEXT != '$version')" 2>/dev/null; then
    exit 0
fi
if ! install_cached; then
    build
    install_cached || fail "the wheel that was built is not in $cache/$tag."
fi
