#!/usr/bin/env bash
# Makes the environment with the test extras and runs the test-suite; arguments go to pytest. The slow tests too:
#
#   bash scripts/test.sh -m "slow or not slow"
#
# Where there is a GPU, what only it can show is tested first; all else is of the processor.

source "$(dirname "$0")/environment.sh"
install_litpeft "[test]"
if .venv/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "== pytest, with the GPU"
    .venv/bin/python -m pytest tests/test_cuda.py tests/test_native_gpu.py
fi
echo "== pytest"
CUDA_VISIBLE_DEVICES='' exec .venv/bin/python -m pytest "$@"
