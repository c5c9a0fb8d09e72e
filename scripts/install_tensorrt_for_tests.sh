#!/usr/bin/env bash
# Install what the TensorRT tests need on a machine without a GPU, into the active Python:
# TensorRT's own bindings, the library of TensorRT for RTX (it builds engines with no GPU), cuda-python, and pycuda.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --no-deps: the bindings ask for libraries that need a GPU's machine; the tests put the RTX library in their place.
# 0.5.0 is the first whose library keeps int8 convolutions under these bindings.
python -m pip install --no-deps tensorrt-cu13-bindings==11.4.0.106 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0
python -m pip install 'cuda-bindings>=13,<14'
scripts/install_pycuda.sh
