#!/usr/bin/env bash
# Makes the environment with the test extras and runs the test-suite; arguments go to pytest. The slow tests too, and the
# rest of the tables of which those show every pair:
#
#   bash scripts/test.sh -m "not full"
#   bash scripts/test.sh -m full
#
# With --parity, the comparisons with packages that want older libraries than litpeft, or many, in an environment of
# their own:
#
#   bash scripts/test.sh --parity
#
# Two cores and more share the tests; `-n 0` runs one after the other, as a debugger needs. What they write lies in the
# machine's memory where there is room for it: a checkpoint waits for the disk, and these are tens of thousands.
# Where there is a GPU, what only it can show is tested first; all else is of the processor.

source "$(dirname "$0")/environment.sh"
if [ "${1-}" = --parity ]; then
    shift
    [ -x .venv-parity/bin/python ] || "$PYTHON" -m venv .venv-parity
    echo "== installing adapters, lm_eval, loralib, pyreft and pyvene into .venv-parity"
    pip=(.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" -r tests/parity/requirements.txt
    "${pip[@]}" --no-deps adapters==1.3.0 loralib==0.1.2 pyreft==0.0.7 pyvene==0.1.8
    OMP_NUM_THREADS=1 exec .venv-parity/bin/python -m pytest -rs tests/parity "$@"
fi
install_litpeft "[test]"
if .venv/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "== pytest, with the GPU"
    .venv/bin/python -m pytest tests/test_{cuda,native_gpu,fused_training,fp8,gpu_decode,to_device}.py
fi
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? cores : 4)) # each needs some 2 GB
echo "== pytest, $workers at a time"
room=$(df -Pk /dev/shm 2>/dev/null | awk 'END { print $4 }' || true) # KiB
if [ "${room:-0}" -gt $((4 << 20)) ]; then
    export PYTEST_DEBUG_TEMPROOT=${PYTEST_DEBUG_TEMPROOT:-/dev/shm}
fi
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' exec .venv/bin/python -m pytest -n "$workers" --dist worksteal "$@"
